"""Which steps make up which epoch."""

from __future__ import annotations

import math
from typing import NamedTuple

from fromzero.recipe import Recipe


class Timetable(NamedTuple):
    """How many images the first epoch of a run trains on, how many every later one, and how many a step. Epochs are
    counted in fractions where a step is not their last."""

    images: int
    later_images: int
    batch_size: int

    @classmethod
    def of(cls, recipe: Recipe, num_images: int) -> Timetable:
        """The timetable of `recipe` on `num_images` train images; epochs after the first leave out the share
        `skip_easy` of them."""
        return cls(num_images, num_images - int(recipe.skip_easy * num_images), recipe.batch_size)

    @property
    def first_steps(self) -> int:
        return math.ceil(self.images / self.batch_size)

    @property
    def later_steps(self) -> int:
        return math.ceil(self.later_images / self.batch_size)

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch, of which the first is epoch 0."""
        return self.later_steps if epoch > 0 else self.first_steps

    def steps_before(self, epochs: float) -> float:
        """Steps after which so many epochs are done."""
        return epochs * self.first_steps if epochs <= 1 else self.first_steps + (epochs - 1) * self.later_steps

    def start_of(self, epoch: int) -> int:
        """The first step of an epoch; of the number of epochs, all steps there are."""
        return int(self.steps_before(epoch))

    def epochs_after(self, step: int) -> float:
        """Epochs that are done after so many steps."""
        return step / self.first_steps if step <= self.first_steps else 1 + (step - self.first_steps) / self.later_steps

    def images_after(self, step: int) -> int:
        """Images, each as often as it was drawn, after so many steps: where the recipe says `hardest`, a share of them
        was trained on."""
        if step <= self.first_steps:
            return min(step * self.batch_size, self.images)
        epochs, steps = divmod(step - self.first_steps, self.later_steps)
        return self.images + epochs * self.later_images + min(steps * self.batch_size, self.later_images)
