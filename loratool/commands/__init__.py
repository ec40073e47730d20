"""One module a command: the function of the library, which composes the packages below it, and its options."""
