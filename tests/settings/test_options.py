"""Options with the comments at the heads of their YAMLs, for the help and docs/methods.md."""

from permllm.settings.options import EXPLAINED, help_of_groups, options


def test_the_help_has_a_sentence_for_each_method_also_of_another_package() -> None:
    shown = help_of_groups(["pkg://docs.plugin.mypackage.conf"])
    for group in EXPLAINED:
        for option, head in options(group).items():
            sentence = head.partition(". ")[0].removesuffix(".")
            assert 3 < len(sentence.split()) <= 20, option
            assert f"{option} " in shown
            assert f" {sentence}." in shown
    assert "  spread " in shown
