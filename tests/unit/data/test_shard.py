"""A shard is the tar that webdataset writes."""

import io

from rsb_cluster.data.shard import _tar
from tests.unit.samples import some


def test_a_tar_is_the_one_that_webdataset_writes():
    import webdataset

    samples = [*some(9), ("d/" * 60 + "long", b"long", "png", 2), ("before", b"x", "bmp", 1)]
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="rsb", group="rsb", compress=False) as writer:
        for key, image, extension, label in samples:
            writer.write({"__key__": key, extension: image, "cls": b"%d" % label})
    assert _tar(samples) == buffer.getvalue()
