"""LaMP's and LongLaMP's official metrics, as functions and as evaluate.Metric classes."""
