"""How an option is described once, and becomes a Click option, a keyword, a check and a word of a command line."""
