"""Plans in the forms that serving engines read, one file an engine; each is read back too."""
