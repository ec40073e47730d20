"""Object stores that speak S3: names, requests that are patient and checked, ranges of objects."""
