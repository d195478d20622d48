"""What a comparison shows: contrasts, tables, plots, pages."""
