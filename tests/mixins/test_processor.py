"""transformers' `ProcessorTesterMixin` on the processor, with the small checkpoint's files."""

import unittest
import unittest.mock
from pathlib import Path

from transformers_tests import test_processing_common as common

from llava15_fast import LlavaOnevision1_5Processor

ASSETS = Path(__file__).parents[2] / "assets"


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaOnevision1_5Processor
    model_id = str(ASSETS / "scenes_checkpoint")

    def setUp(self):
        """Pictures that are here, in the place of two that lie on the Hub."""
        picture = str(ASSETS / "samples/scene_0.png")
        self.enterContext(unittest.mock.patch.dict(common.MODALITY_INPUT_DATA, images=[picture] * 2))
        self.enterContext(unittest.mock.patch.object(common, "url_to_local_path", lambda url: picture))
