//! The unprivileged user that PostgreSQL runs as when we are root.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use super::{EmbeddedError, binaries, io_error};

/// One of `/etc/passwd`.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
    uid: u32,
    gid: u32,
}

/// `postgres` if it exists, otherwise `nobody`; `None` if we are not root and stay who we are.
pub(super) fn unprivileged() -> Result<Option<User>, EmbeddedError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let path = Path::new("/etc/passwd");
    let passwd = fs::read_to_string(path).map_err(io_error("read", path))?;
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| passwd.lines().find_map(|line| entry(line, name)))
        .map(Some)
        .ok_or_else(|| EmbeddedError::Missing {
            program: "an unprivileged user (postgres or nobody)".to_owned(),
            package: "postgresql".to_owned(),
        })
}

/// Parses `name:password:uid:gid:…`.
fn entry(line: &str, name: &str) -> Option<User> {
    let mut fields = line.split(':');
    if fields.next() != Some(name) {
        return None;
    }
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(User {
        name: name.to_owned(),
        uid,
        gid,
    })
}

impl User {
    /// Gives it a directory or file.
    pub(super) fn own(&self, path: &Path) -> Result<(), EmbeddedError> {
        chown(path, Some(self.uid), Some(self.gid)).map_err(io_error("change the owner of", path))
    }

    /// Whether it gets as far as into a directory. The kernel is asked, since modes are not the whole truth.
    pub(super) async fn can_enter(&self, path: &Path) -> Result<bool, EmbeddedError> {
        let setpriv = binaries::setpriv()?;
        let status = tokio::process::Command::new(&setpriv)
            .args(self.setpriv_arguments())
            .args(["--", "test", "-x"])
            .arg(path)
            .current_dir("/")
            .status()
            .await
            .map_err(io_error("run", &setpriv))?;
        Ok(status.success())
    }

    /// What makes `setpriv` become this user.
    pub(super) fn setpriv_arguments(&self) -> [String; 3] {
        [
            format!("--reuid={}", self.uid),
            format!("--regid={}", self.gid),
            "--init-groups".to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::entry;

    #[test]
    fn a_line_of_passwd_is_understood() {
        let user = entry(
            "postgres:x:101:104:PostgreSQL administrator,,,:/var/lib/postgresql:/bin/bash",
            "postgres",
        );
        let user = user.unwrap();
        assert_eq!((user.uid, user.gid), (101, 104));
        assert!(entry("postgres2:x:1:1::/:/bin/sh", "postgres").is_none());
        assert!(entry("postgres:x:", "postgres").is_none());
    }
}
