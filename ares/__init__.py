"""Foundation of the ARES reproduction. Nothing in here imports the scripts or the shared modules above it."""
