"""What the ranks of a job do together: reduce, gather and broadcast, over each transport."""
