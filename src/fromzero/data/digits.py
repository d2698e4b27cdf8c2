"""scikit-learn's bundled handwritten digits as 32×32 RGB: an image set that needs no file and no network.

1,797 images of 8×8 pixels with values 0 to 16 (Alpaydin and Kaynak, UCI, 1998).
"""

import numpy as np

from fromzero.data.images import Images, ImageSet, stratified_split


def load_digits() -> ImageSet:
    """The digits, each pixel a 4×4 square of grey; a fixed stratified fifth is the test set."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    whole = Images(np.repeat(grey[..., None], 3, axis=3), bunch.target.astype(np.int64))
    train, test = (whole.take(indices) for indices in stratified_split(whole.labels, 0.2, "digits/test"))
    return ImageSet(
        name="digits",
        train=train,
        test=test,
        class_names=tuple(str(digit) for digit in range(10)),
        source="scikit-learn's bundled digits",
        fingerprints={"train": train.fingerprint(), "test": test.fingerprint()},
    )
