"""Side-by-side measurements of regraft against other compilers and runtimes."""
