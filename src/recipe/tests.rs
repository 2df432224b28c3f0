//! Recipes: what is read, what is refused, what each matrix gets.

use super::*;

const TWO_RULES: &str = r#"
schema = 1
solver = "rtn"
[[rule]]
tensor = "layers.*.experts.*.*"
codec = "int4-g64"
[[rule]]
tensor = "layers.3.experts.1*.down_proj"
codec = "native"
"#;

#[test]
fn the_last_rule_that_matches_wins() {
    let recipe = Recipe::parse(TWO_RULES).unwrap();
    let choices = Choices::new(&recipe, &[(3, 12, &MATRICES)]).unwrap();
    let name = |expert, part| choices.get(3, expert, part).unwrap().name();
    assert_eq!(name(0, Part::Down), "int4-g64");
    assert_eq!(name(10, Part::Down), "native");
    assert_eq!(name(10, Part::Up), "int4-g64");
    assert!(choices.get(4, 0, Part::Up).is_err());
}

#[test]
fn a_rule_that_matches_nothing_is_an_error() {
    let e = Choices::new(&Recipe::parse(TWO_RULES).unwrap(), &[(2, 12, &MATRICES)]).unwrap_err();
    assert_eq!(e.what(), "rule 2 (\"layers.3.experts.1*.down_proj\") matches no matrix of this model");
    assert_eq!(e.kind().exit_code(), 78);
}

#[test]
fn a_matrix_without_a_rule_is_an_error() {
    let text =
        TWO_RULES.replace("layers.*.experts.*.*", "layers.*.experts.*.*_proj").replace("1*.down", "*.down");
    let recipe = Recipe::parse(&text.replacen("*_proj", "up_proj", 1)).unwrap();
    let e = Choices::new(&recipe, &[(3, 2, &MATRICES)]).unwrap_err();
    assert_eq!(e.tensor(), Some("layers.3.experts.0.gate_proj"));
    let choices = Choices::new(&recipe, &[(3, 2, &[Part::Up, Part::Down])]).unwrap();
    assert_eq!(choices.of_part(3, 1, Part::Gate).unwrap().name(), "native", "there is none");
}

#[test]
fn nonsense_is_refused() {
    for (from, to) in [
        ("rtn", "magic"),
        ("int4-g64", "int40"),
        ("\"int4-g64\"", "\"int4-g64\"\nbits = 3.0"),
        ("schema = 1", "schema = 2"),
        ("schema", "skema"),
    ] {
        assert_eq!(
            Recipe::parse(&TWO_RULES.replacen(from, to, 1)).unwrap_err().kind().exit_code(),
            78,
            "{to}"
        );
    }
    assert!(Recipe::parse(&TWO_RULES.replace("schema = 1", "schema = 1\nalign = 5000")).is_err());
}

#[test]
fn text_goes_back_and_forth() {
    let recipe = Recipe::parse(TWO_RULES).unwrap();
    assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe);
}

#[test]
fn stars_stand_for_any_characters_of_one_segment() {
    for (pattern, text, expected) in [
        ("*", "17", true),
        ("1*", "17", true),
        ("1*", "71", false),
        ("*_proj", "up_proj", true),
        ("a*b*c", "abc", true),
        ("a*b*c", "acb", false),
        ("x", "xy", false),
        ("4-17", "4", true),
        ("4-17", "17", true),
        ("4-17", "18", false),
        ("4-17", "4-17", false),
    ] {
        assert_eq!(segment_matches(pattern, text), expected, "{pattern} {text}");
    }
}
