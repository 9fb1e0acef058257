"""What a user sets of training: documented once, checked where it is set."""
