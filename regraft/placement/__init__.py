"""What ``regraft place`` needs besides the solver: files that torch reads, executors, tables and pages."""
