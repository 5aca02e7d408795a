// As kernels.cpp, for the updates of one rule; for those alone, compiled when they are launched.

#include "try.h"

// Returns whether there is such a kernel. Names have the word RULE in the place of the rule.
extern "C" int launch(const char* name, unsigned blocks, unsigned threads, void** arguments) {
    TRY(update<RULE, double, double, double>)
    TRY(update<RULE, float, float, float>)
    TRY(update<RULE, Half, Half, float>)
    TRY(update<RULE, Half, float, float>)
    return 0;
}
