"""Histories in prompts: LaMP's wording and budget, and profiles in words."""
