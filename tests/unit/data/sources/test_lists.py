"""Data sets that come with a list of their images."""

from rsb_cluster.data.index import load_index
from rsb_cluster.data.labels import load_label_sets
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.storage.store import Store
from tests.unit import formats


def test_vizwiz_keeps_the_classes_that_an_answer_may_be_and_labels_where_one_has_them(tmp_path):
    formats.vizwiz(tmp_path)
    store = Store(tmp_path / "out" / "val")
    make_set(open_set("vizwiz-classification", root=tmp_path, any_count=True), Store(tmp_path / "out"))
    sets = load_label_sets(store, load_index(store), "vizwiz")
    assert sets.among.tolist() == [7, 291]
    assert not sets.scored.any() and sets.groups == {}
    (tmp_path / "labels.json").write_text(
        '{"VizWiz_train_00000000.jpg": {"labels": [291, 7], "flaws": ["Blur", "Dark"]},'
        ' "VizWiz_val_00000003.jpg": {"labels": [7]}}'
    )
    source = open_set("vizwiz-classification", root=tmp_path, any_count=True)
    make_set(source, Store(tmp_path / "out"), overwrite=True)
    index = load_index(store)
    sets = load_label_sets(store, index, "vizwiz")
    place = {index.key(i): i for i in range(4)}
    assert sets.of(place["VizWiz_train_00000000"]).tolist() == [291, 7]
    assert sets.scored.sum() == 2
    members = {group: {key for key, i in place.items() if inside[i]} for group, inside in sets.groups.items()}
    first = {"VizWiz_train_00000000"}
    assert members == {"Blur": first, "Dark": first, "Corrupted": first, "Clean": {"VizWiz_val_00000003"}}
    assert index.labels[place["VizWiz_val_00000003"]] == 7
