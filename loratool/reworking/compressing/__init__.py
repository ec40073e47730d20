"""Many adapters of one base in one file that they share and a small one each, and back."""
