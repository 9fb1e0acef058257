"""What each method learns, and how far the model drifts for it: the frontier that decides the defaults."""
