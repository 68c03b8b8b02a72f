//! The published shape of the document, and whether the documents that lie about have it.

use schemars::schema_for;

use super::document::Document;

/// The JSON schema of everything that is written.
pub(crate) fn schema() -> String {
    format!("{:#}\n", schema_for!(Document).as_value())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn bench(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    #[test]
    fn the_published_schema_is_current() {
        let published = fs::read_to_string(bench("schema.json")).unwrap();
        assert!(
            published == schema(),
            "the types have changed: stockade-bench schema > bench/schema.json"
        );
    }

    #[test]
    fn every_result_has_the_published_shape() {
        let Ok(results) = fs::read_dir(bench("results")) else {
            return;
        };
        for entry in results {
            let file = entry.unwrap().path();
            if file
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                Document::read(&file).unwrap();
            }
        }
    }
}
