"""Proves a merged model, whoever made it, and tells what is wrong with one that is not what the formula gives."""
