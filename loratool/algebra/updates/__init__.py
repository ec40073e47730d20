"""What an adapter does to one weight, as algebra on blocks of its rows.

An update knows no names and no files. Its fields hold tensors, or descriptions of tensors that are
still on disk, so that it can be planned with before anything is read.
"""
