"""The command line: parse, call one library function, render, pick the exit code. No logic lives here."""
