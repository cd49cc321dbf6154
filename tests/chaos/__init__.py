"""What callers see while processes of a loaded stack are killed, ended and stopped: `make chaos` prints a table."""
