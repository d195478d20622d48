"""LaMP and LongLaMP: the official metrics."""
