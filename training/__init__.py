"""Recipes that train what is compared with a plug; `python -m training.run CONFIG`."""
