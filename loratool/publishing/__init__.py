"""What goes to the Hub: a finished folder by `push`, a model that is never whole on this disk by `stream`."""
