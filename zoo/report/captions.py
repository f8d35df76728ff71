"""The pictures that may lie beside a report or a card, and what each shows, for those who do not
see it."""

CAPTIONS = {
    "comparison.png": "Accuracy of each model on the same test images, with 95 % intervals",
    "confusion.png": "Confusion matrix: true classes by row, predicted ones by column",
    "calibration.png": "Reliability diagram: accuracy by confidence",
    "interpolation.png": "Accuracy on validation by the value that was searched",
}
