//! Secrets that are made once and kept in the data directory, each in a file of its own, mode 0600.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rand::Rng;
use rand::distr::Alphanumeric;
use secrecy::SecretString;

use super::{EmbeddedError, io_error};

/// Letters and digits of a secret: 285 bits, and nothing that a URL or a file would have to quote.
const SECRET_LETTERS: usize = 48;

/// The secret of that name; made now if there is none.
pub(super) fn kept(data_dir: &Path, name: &str) -> Result<SecretString, EmbeddedError> {
    let path = data_dir.join(name);
    match fs::read_to_string(&path) {
        Ok(secret) => Ok(SecretString::from(secret.trim_end())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = random_letters(SECRET_LETTERS);
            write_closed(&path, &secret)?;
            Ok(SecretString::from(secret))
        }
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// A password that is not kept.
pub(super) fn random() -> SecretString {
    SecretString::from(random_letters(SECRET_LETTERS))
}

/// A name that nobody else has.
pub(super) fn random_name() -> String {
    random_letters(16)
}

/// Writes a file of mode 0600, whole or not at all, also across a power cut.
pub(super) fn write_closed(path: &Path, text: &str) -> Result<(), EmbeddedError> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    let unfinished = Path::new(&unfinished);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(unfinished)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(unfinished, path)
    };
    write().map_err(io_error("write", path))
}

fn random_letters(length: usize) -> String {
    rand::rng()
        .sample_iter(Alphanumeric)
        .take(length)
        .map(char::from)
        .collect()
}
