"""Options with the comments at the heads of their YAMLs, for the help and docs/methods.md."""

import pytest

from permllm.settings.options import EXPLAINED, help_of_groups, options, set_by_method


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("wanda", {"permutation.name": "none", "mask.name": "pruner", "pruner.name": "wanda"}),
        ("masks-folded", {"permutation.constraint": "foldable", "mask.name": "score"}),
        ("permllm-ria-last6", {"pruner.name": "ria", "permutation.last_layers": 6}),
        ("deploy", {"reconstruction.relative": True, "permutation.constraint": "foldable"}),
        ("frontier/weights", {"reconstruction.relative": True, "permutation.name": "none"}),
    ],
)
def test_what_a_method_sets_is_in_its_yaml_and_in_those_that_it_is_a_variant_of(
    method: str, settings: dict[str, object]
) -> None:
    assert set_by_method(method).items() >= settings.items()
    assert set_by_method("of-another-package") == {}


def test_the_help_has_a_sentence_for_each_method_also_of_another_package() -> None:
    shown = help_of_groups(["pkg://docs.plugin.mypackage.conf"])
    for group in EXPLAINED:
        for option, head in options(group).items():
            sentence = head.partition(". ")[0].removesuffix(".")
            assert 3 < len(sentence.split()) <= 20, option
            assert f"{option} " in shown
            assert f" {sentence}." in shown
    assert "  spread " in shown
