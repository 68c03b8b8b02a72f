//! The machine under a server, which a test can break: see `shim.c`.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, Weak},
};

use stockade::embedded::PostgresServer;
use tempfile::TempDir;

use super::{Redis, open_dir};

/// The library, compiled once while anybody uses it.
struct Library(TempDir);

impl Library {
    fn get() -> Arc<Self> {
        static LIBRARY: Mutex<Weak<Library>> = Mutex::new(Weak::new());
        let mut library = LIBRARY.lock().unwrap();
        if let Some(library) = library.upgrade() {
            return library;
        }
        let compiled = Self(open_dir());
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/shim.c");
        let cc = Command::new("cc")
            .args([
                "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o",
            ])
            .arg(compiled.file())
            .arg(source)
            .output()
            .unwrap_or_else(|error| panic!("cc: {error}; .ci/install installs it"));
        assert!(
            cc.status.success(),
            "{}",
            String::from_utf8_lossy(&cc.stderr)
        );
        let compiled = Arc::new(compiled);
        *library = Arc::downgrade(&compiled);
        compiled
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("shim.so")
    }
}

/// One machine: its clock, its disk, and what is safe on it.
pub(crate) struct Shim {
    library: Arc<Library>,
    dir: TempDir,
    state: File,
}

/// What a disk writes whole.
const SECTOR: u64 = 512;
/// The length of `struct undo`.
const UNDO_HEAD: usize = 24;

// The layout of `struct state`.
const CLOCK_OFFSET: u64 = 0;
const SYNC_DELAY: u64 = 8;
const FILE_SIZE_MAX: u64 = 16;
const SYNCS: u64 = 24;
const FILES: usize = 32;
const FILES_COUNT: usize = 2048;

impl Shim {
    pub(crate) fn new() -> Self {
        let dir = open_dir();
        let state = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("state"))
            .unwrap();
        state.set_len((FILES + 16 * FILES_COUNT) as u64).unwrap();
        Self {
            library: Library::get(),
            dir,
            state,
        }
    }

    /// What puts a server onto this machine.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let path = |name: &str| self.dir.path().join(name);
        [
            ("LD_PRELOAD", self.library.file()),
            ("SHIM_STATE", path("state")),
        ]
        .map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()))
        .to_vec()
    }

    /// What puts a server onto this machine that writes into the middle of its files, and may run as
    /// another user.
    pub(crate) fn environment_with_undo(&self) -> Vec<(String, String)> {
        let undo = self.undo_dir();
        fs::create_dir(&undo).unwrap();
        for (path, mode) in [(&undo, 0o777), (&self.dir.path().join("state"), 0o666)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut environment = self.environment();
        let undo = undo.to_str().unwrap().to_owned();
        environment.push(("SHIM_UNDO".to_owned(), undo));
        environment
    }

    fn undo_dir(&self) -> PathBuf {
        self.dir.path().join("undo")
    }

    /// Takes back what was written and not synced in every file below a directory, as a power loss
    /// does. `keep` says of each sector (512 bytes) that was written whether it had reached the disk
    /// all the same: a disk may write any of them early. Gives how many were taken back.
    fn undo(&self, dir: &Path, keep: &mut impl FnMut() -> bool) -> u64 {
        let mut lost = 0;
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let about = path.symlink_metadata().unwrap();
            if about.is_dir() {
                lost += self.undo(&path, keep);
            }
            let list = self.undo_dir().join(about.ino().to_string());
            if !about.is_file() || !list.exists() {
                continue;
            }
            let bytes = fs::read(&list).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            let mut records = Vec::new();
            let mut rest = &bytes[..];
            while let Some((head, old)) = rest.split_at_checked(UNDO_HEAD) {
                let word = |at: usize| u64::from_ne_bytes(head[at..at + 8].try_into().unwrap());
                let (offset, size, length) = (word(0), word(8), word(16));
                // The last one may be torn: then its write was not made.
                let Some((old, after)) = old.split_at_checked(length.try_into().unwrap()) else {
                    break;
                };
                records.push((offset, size, old));
                rest = after;
            }
            for (offset, _, old) in records.iter().rev() {
                let mut at = *offset;
                while at < offset + old.len() as u64 {
                    let end = ((at / SECTOR + 1) * SECTOR).min(offset + old.len() as u64);
                    if !keep() {
                        let of = |at: u64| usize::try_from(at - offset).unwrap();
                        file.write_all_at(&old[of(at)..of(end)], at).unwrap();
                        lost += 1;
                    }
                    at = end;
                }
            }
            // The first one knows the size that was synced.
            if let Some((_, size, _)) = records.first()
                && *size != about.len()
                && !keep()
            {
                lost += 1;
                file.set_len(*size).unwrap();
            }
            fs::write(&list, "").unwrap();
        }
        lost
    }

    fn set(&self, at: u64, value: i64) {
        self.state.write_all_at(&value.to_ne_bytes(), at).unwrap();
    }

    /// Sets the wall clock: milliseconds ahead of the truth, at once and until the next time.
    pub(crate) fn set_clock_ahead(&self, ms: i64) {
        self.set(CLOCK_OFFSET, ms);
    }

    /// From now on each sync takes so many milliseconds longer.
    pub(crate) fn slow_syncs(&self, ms: i64) {
        self.set(SYNC_DELAY, ms);
    }

    /// From now on no file grows beyond so many bytes: the disk is full. 0 gives room again.
    pub(crate) fn fill_disk(&self, bytes: u64) {
        self.set(FILE_SIZE_MAX, bytes.cast_signed());
    }

    /// How many syncs are done.
    pub(crate) fn syncs(&self) -> u64 {
        let mut bytes = [0; 8];
        self.state.read_exact_at(&mut bytes, SYNCS).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// The files below a directory that are longer than what is synced of them, and that length.
    fn unsynced(&self, dir: &Path) -> Vec<(PathBuf, u64)> {
        let mut state = vec![0; FILES + 16 * FILES_COUNT];
        self.state.read_exact_at(&mut state, 0).unwrap();
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        let synced = |file: u64| {
            let mut known = state[FILES..].chunks(16);
            known
                .find(|entry| word(&entry[..8]) == file)
                .map_or(0, |entry| word(&entry[8..]))
        };
        let mut longer = Vec::new();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let about = path.metadata().unwrap();
            if about.is_dir() {
                longer.extend(self.unsynced(&path));
                continue;
            }
            let synced = synced((about.dev() << 40) ^ about.ino());
            if about.len() > synced {
                longer.push((path, synced));
            }
        }
        longer
    }

    /// Cuts every file below a directory to what is synced of it, as a power loss does. Gives the
    /// bytes that were cut off.
    fn cut(&self, dir: &Path) -> u64 {
        let mut lost = 0;
        for (path, synced) in self.unsynced(dir) {
            lost += path.metadata().unwrap().len() - synced;
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(synced)
                .unwrap();
        }
        lost
    }
}

impl Redis {
    /// Ends it as a power loss does: at once, with nothing left on disk but what was synced. Gives
    /// the bytes that were lost.
    pub(crate) async fn power_loss(&self, shim: &Shim) -> u64 {
        self.server.kill().await;
        shim.cut(&self.dir().join("appendonlydir"))
    }
}

/// Ends a PostgreSQL as a power loss does: at once, with nothing left on disk but what was synced,
/// and those sectors that `keep` says were written early. Gives how many sectors were lost.
pub(crate) async fn power_loss(
    server: &PostgresServer,
    dir: &Path,
    shim: &Shim,
    keep: &mut impl FnMut() -> bool,
) -> u64 {
    server.kill().await;
    shim.undo(dir, keep)
}
