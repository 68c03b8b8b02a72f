//! What the documents name is there: a promise without its test is no promise.

use std::{fs, path::Path};

use stockade::domain::allowance::{Allowances, Rule};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// All Rust code of the repository.
fn code(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            code(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn is_test_name(word: &str) -> bool {
    word.matches('_').count() >= 3
        && word
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

#[test]
fn every_test_and_file_that_a_document_names_exists() {
    let mut all = String::new();
    for dir in ["src", "tests", "bench/src"] {
        code(&Path::new(ROOT).join(dir), &mut all);
    }
    let mut wrong = Vec::new();
    let mut named = 0;
    for document in [
        "docs/ARCHITECTURE.md",
        "docs/GUARANTEES.md",
        "docs/SECURITY.md",
        "docs/TESTING.md",
    ] {
        let text = fs::read_to_string(Path::new(ROOT).join(document)).unwrap();
        for word in quoted(&text) {
            if is_test_name(word) {
                named += 1;
                if !all.contains(&format!("fn {word}(")) {
                    wrong.push(format!("{document}: no test {word}"));
                }
            }
            let is_file = Path::new(word).extension().is_some_and(|it| it == "rs")
                && word.contains('/')
                && !word.contains([' ', '*']);
            if is_file && !Path::new(ROOT).join(word).is_file() {
                wrong.push(format!("{document}: no file {word}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(named > 40, "only {named} tests are named");
}

#[test]
fn every_limit_is_in_the_guide_with_what_it_usually_allows() {
    let usual = Allowances::default();
    let guide = fs::read_to_string(Path::new(ROOT).join("docs/DEPLOYMENT.md")).unwrap();
    for rule in Rule::ALL {
        let row = format!("| `{}` | `{}` |", rule.word(), usual.of(*rule));
        assert!(guide.contains(&row), "{row}");
    }
}
