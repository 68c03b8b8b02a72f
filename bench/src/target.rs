//! Where the server is, its secret, and the database behind it.

use std::env;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hyper::Uri;
use serde::Deserialize;

/// The file in the data directory that holds the secret of an embedded server.
const SECRET_FILE: &str = "jwt_secret";

/// The file in the data directory that names the services behind the server.
const ENDPOINTS_FILE: &str = "endpoints.json";

/// The environment variable with the secret that signs access tokens.
const SECRET_VARIABLE: &str = "STOCKADE_JWT_SECRET";

/// An HTTP server on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Where to connect.
    pub(crate) address: SocketAddr,
    /// What the requests say in `Host`.
    pub(crate) authority: String,
}

impl Target {
    /// Reads an address such as `http://127.0.0.1:8080`. Anything that is not this machine is
    /// refused: a load harness in the wrong direction is an attack.
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let uri: Uri = url
            .parse()
            .with_context(|| format!("{url} is not an address"))?;
        let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            bail!("{url} is not an address like http://127.0.0.1:8080");
        };
        if !matches!(uri.path(), "" | "/") {
            bail!("{url} has a path; give the server's root, like http://{authority}");
        }
        let host = authority.host().trim_matches(['[', ']']);
        let addresses: Vec<SocketAddr> = (host, authority.port_u16().unwrap_or(80))
            .to_socket_addrs()
            .with_context(|| format!("{host} cannot be resolved"))?
            .collect();
        if addresses.iter().any(|address| !address.ip().is_loopback()) {
            bail!("{url} is not on this machine; a crowd is sent to loopback addresses only");
        }
        // `localhost` is often both ::1 and 127.0.0.1, and a server usually listens on the latter.
        let address = addresses.iter().find(|address| address.is_ipv4());
        Ok(Self {
            address: *address.or(addresses.first()).context("no address")?,
            authority: authority.to_string(),
        })
    }
}

/// What an operator of the server can read besides its API.
#[derive(Clone)]
pub(crate) struct Backstage {
    /// The server's data directory; it exists only if the server is embedded.
    pub(crate) data_dir: PathBuf,
    /// The secret, if the environment gives it.
    pub(crate) secret: Option<String>,
    /// The database's address, if the environment gives it.
    pub(crate) database: Option<String>,
}

/// The services behind an embedded server.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Endpoints {
    pub(crate) redis_url: String,
    pub(crate) database_url: String,
}

impl Backstage {
    /// With what the environment says.
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            secret: env::var(SECRET_VARIABLE).ok(),
            database: env::var("DATABASE_URL").ok(),
        }
    }

    /// The secret that signs access tokens, from the environment or the data directory.
    pub(crate) fn secret(&self) -> Result<String> {
        if let Some(secret) = &self.secret {
            return Ok(secret.clone());
        }
        let file = self.data_dir.join(SECRET_FILE);
        let secret = fs::read_to_string(&file).with_context(|| {
            format!(
                "no secret to sign tokens with: set {SECRET_VARIABLE}, or point --data-dir at the \
                 data directory of an embedded server ({} cannot be read)",
                file.display()
            )
        })?;
        Ok(secret.trim_end().to_owned())
    }

    /// The services behind an embedded server.
    pub(crate) fn endpoints(&self) -> Result<Endpoints> {
        let file = self.data_dir.join(ENDPOINTS_FILE);
        let text = fs::read(&file).with_context(|| format!("{} cannot be read", file.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Addresses where the server's database may be, best first. Read anew on every call: an
    /// embedded database has another port after a restart.
    pub(crate) fn databases(&self) -> Vec<String> {
        let embedded = self.endpoints().ok();
        let embedded = embedded.map(|endpoints| endpoints.database_url);
        embedded.into_iter().chain(self.database.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_address_is_taken() {
        for url in [
            "http://127.0.0.1:8080",
            "http://localhost:8080/",
            "http://[::1]:8080",
        ] {
            let target = Target::parse(url).unwrap();
            assert_eq!(target.address.port(), 8080);
            assert!(target.address.ip().is_loopback());
        }
    }

    #[test]
    fn any_other_address_is_refused_in_one_line() {
        for url in ["http://192.0.2.1:8080", "http://0.0.0.0:8080"] {
            let refusal = Target::parse(url).unwrap_err().to_string();
            assert!(refusal.contains("loopback addresses only"), "{refusal}");
        }
        for url in [
            "https://127.0.0.1",
            "127.0.0.1:8080",
            "http://127.0.0.1/v1",
            "::",
        ] {
            assert!(Target::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn the_secret_and_the_database_are_found_in_the_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let backstage = Backstage {
            data_dir: dir.path().to_owned(),
            secret: None,
            database: Some("postgres://127.0.0.1:4/elsewhere".to_owned()),
        };
        assert!(
            backstage
                .secret()
                .unwrap_err()
                .to_string()
                .contains("--data-dir")
        );
        assert_eq!(backstage.databases(), ["postgres://127.0.0.1:4/elsewhere"]);
        fs::write(
            dir.path().join("jwt_secret"),
            "a secret of an embedded server\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("endpoints.json"),
            r#"{"redis_url":"redis://127.0.0.1:1","cache_redis_url":"redis://127.0.0.1:2","database_url":"postgres://127.0.0.1:3/stockade"}"#,
        )
        .unwrap();
        assert_eq!(
            backstage.secret().unwrap(),
            "a secret of an embedded server"
        );
        assert_eq!(backstage.databases()[0], "postgres://127.0.0.1:3/stockade");
    }
}
