import pytest

from train.layer_options import describe, parse_layers, parse_sizes, parse_stages

LAYERS = ("conv1", "conv2", "fc1")


def test_layers():
    assert parse_layers("fc1, conv1,fc1", LAYERS) == ("conv1", "fc1")
    assert parse_layers("all", LAYERS) == LAYERS and parse_layers("none", LAYERS) == ()
    for text in ("conv9", "", "conv1,", "conv1 conv2"):
        with pytest.raises(ValueError, match="--generate: no layer '.*'; the layers are conv1, conv2, fc1"):
            parse_layers(text, LAYERS)


def test_sizes():
    assert parse_sizes("8", LAYERS, 16) == {"conv1": 8, "conv2": 8, "fc1": 8}
    assert parse_sizes("conv2=4, fc1 = 32", LAYERS, 16) == {"conv1": 16, "conv2": 4, "fc1": 32}
    assert parse_sizes("conv2=4,8", LAYERS, 16) == {"conv1": 8, "conv2": 4, "fc1": 8}
    assert parse_sizes("8", (), 16) == {}
    for text in ("0", "-1", "many", "conv1=", "conv1=x", "", "8,", "1.5", "conv1=0"):
        with pytest.raises(ValueError, match="--z-dim: '.*' is not a size or LAYER=SIZE"):
            parse_sizes(text, LAYERS, 16)
    with pytest.raises(ValueError, match="--z-dim: no generated layer 'conv9'; there are conv1, conv2, fc1"):
        parse_sizes("conv9=3", LAYERS, 16)
    with pytest.raises(ValueError, match="--z-dim: no generated layer 'conv1'; there are none"):
        parse_sizes("conv1=3", (), 16)


def test_stages():
    assert parse_stages([], LAYERS, 9) == {"conv1": 0, "conv2": 0, "fc1": 0}
    assert parse_stages(["fc1,conv1@3", "conv2@8"], LAYERS, 9) == {"conv1": 3, "conv2": 8, "fc1": 3}
    assert parse_stages(["conv1@0"], LAYERS, 9) == {"conv1": 0, "conv2": 0, "fc1": 0}
    for text in ("conv1", "@3", "conv1@", "conv1@x", "conv1@-1", "3@conv1"):
        with pytest.raises(
            ValueError, match="--progressive: '.*' is not LAYERS@EPOCHS, as in conv4,conv5@10"
        ):
            parse_stages([text], LAYERS, 9)
    with pytest.raises(ValueError, match="--progressive: no generated layer 'conv9'; there are conv1, conv2"):
        parse_stages(["conv1,conv9@3"], LAYERS, 9)
    with pytest.raises(ValueError, match="--progressive: conv1 is named twice"):
        parse_stages(["conv1@3", "conv2,conv1@4"], LAYERS, 9)
    with pytest.raises(ValueError, match="--progressive conv1@9: the run has 9 epochs only"):
        parse_stages(["conv1@9"], LAYERS, 9)


def test_descriptions_can_be_given_again():
    for sizes, stages in (("8", []), ("conv2=4", ["fc1,conv1@3", "conv2@8"]), ("16,fc1=2", ["fc1@1"])):
        starts, z_dims = parse_stages(stages, LAYERS, 9), parse_sizes(sizes, LAYERS, 16)
        text = describe(starts, z_dims)
        assert text["generate"] == "conv1,conv2,fc1"
        assert parse_sizes(text["z_dim"], LAYERS, 1) == z_dims
        again = [] if text["progressive"] == "none" else text["progressive"].split()
        assert parse_stages(again, LAYERS, 9) == starts
    assert describe({}, {}) == {"generate": "none", "z_dim": "none", "progressive": "none"}
    assert describe({"conv1": 0}, {"conv1": 8}) == {"generate": "conv1", "z_dim": "8", "progressive": "none"}
