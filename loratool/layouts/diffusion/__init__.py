"""How image and video models name their weights, in the layout of diffusers and in that of their authors: data, no logic."""
