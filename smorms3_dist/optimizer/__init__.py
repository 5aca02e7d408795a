"""What stands in the place of a Chainer optimizer: made, run and saved."""
