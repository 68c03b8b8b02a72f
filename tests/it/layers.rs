//! The layers of the architecture, enforced: a module imports only from layers below its own.

use std::{fs, path::Path};

/// Modules of the library and their layer. Neighbours in a layer do not know each other.
const LAYERS: [(&str, u8); 23] = [
    ("domain", 0),
    ("faults", 0),
    ("clock", 1),
    ("config", 1),
    ("metrics", 1),
    ("readiness", 1),
    ("engine", 2),
    ("store", 2),
    ("writer", 3),
    ("auth", 3),
    ("catalogue", 3),
    ("embedded", 3),
    ("ops", 3),
    ("payments", 3),
    ("realtime", 3),
    ("throttle", 3),
    // Tells whether an order is stored, by what the writers of this process know.
    ("sales", 4),
    ("http", 5),
    ("lifecycle", 6),
    ("app", 7),
    ("cli", 8),
    ("lib", 9),
    ("main", 9),
];

fn layer(module: &str) -> u8 {
    let known = LAYERS.iter().find(|(name, _)| *name == module);
    known.unwrap_or_else(|| panic!("{module} has no layer")).1
}

fn check(path: &Path, module: &str, wrong: &mut Vec<String>) {
    let text = fs::read_to_string(path).unwrap();
    // Imports and paths in the code, in one go: `crate::engine::…` and `crate::{ engine::… }`.
    let mut found: Vec<String> = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push(std::mem::take(&mut word)),
                    _ if depth == 0 => word.push(c),
                    _ => {}
                }
            }
            found.push(word);
        } else {
            found.push(rest.to_owned());
        }
    }
    for import in found {
        let name: String = import
            .trim_start()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let Some((_, below)) = LAYERS.iter().find(|(known, _)| *known == name) else {
            continue;
        };
        if name != module && *below >= layer(module) {
            wrong.push(format!("{}: {module} imports {name}", path.display()));
        }
    }
    for (library, home) in [("fred", "engine"), ("sqlx", "store"), ("axum", "http")] {
        let allowed = module == home || (library == "axum" && module == "app");
        if !allowed && text.contains(&format!("use {library}")) {
            wrong.push(format!("{}: {library} belongs to {home}", path.display()));
        }
    }
}

fn walk(dir: &Path, module: Option<&str>, wrong: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let module = module.unwrap_or(&name);
        if path.is_dir() {
            walk(&path, Some(module), wrong);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            check(&path, module, wrong);
        }
    }
}

#[test]
fn modules_import_only_from_layers_below() {
    let mut wrong = Vec::new();
    walk(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        None,
        &mut wrong,
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}
