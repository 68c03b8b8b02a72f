//! `endpoints.json`: where the services are, for the operator's own tools and for the next session's ports.

use std::fs;
use std::path::Path;

use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};

use super::{EmbeddedError, secrets};
use crate::config::Endpoints;

const FILE: &str = "endpoints.json";

#[derive(Serialize, Deserialize)]
struct File {
    #[serde(rename = "redis_url")]
    redis: String,
    #[serde(rename = "cache_redis_url")]
    cache_redis: String,
    #[serde(rename = "database_url")]
    database: String,
}

/// The ports of the last session, as far as they are known.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) redis: Option<u16>,
    pub(super) cache_redis: Option<u16>,
    pub(super) database: Option<u16>,
}

/// Writes the file, mode 0600 since it carries the passwords.
pub(super) fn write(data_dir: &Path, endpoints: &Endpoints) -> Result<(), EmbeddedError> {
    let cache = endpoints
        .cache_redis_url
        .as_ref()
        .unwrap_or(&endpoints.redis_url);
    let json = serde_json::json!(File {
        redis: endpoints.redis_url.expose_secret().to_owned(),
        cache_redis: cache.expose_secret().to_owned(),
        database: endpoints.database_url.expose_secret().to_owned(),
    });
    secrets::write_closed(&data_dir.join(FILE), &format!("{json:#}\n"))
}

/// Reads where the services of the server on `data_dir` are.
///
/// # Errors
/// [`EmbeddedError::NotServed`] when no server has run there.
pub fn running(data_dir: &Path) -> Result<Endpoints, EmbeddedError> {
    let file = fs::read_to_string(data_dir.join(FILE))
        .ok()
        .and_then(|text| serde_json::from_str::<File>(&text).ok())
        .ok_or_else(|| EmbeddedError::NotServed {
            data_dir: data_dir.to_owned(),
        })?;
    Ok(Endpoints {
        redis_url: file.redis.into(),
        cache_redis_url: Some(file.cache_redis.into()),
        database_url: file.database.into(),
    })
}

/// Reads the last session's ports; a missing or broken file means none.
pub(super) fn last_ports(data_dir: &Path) -> Ports {
    fs::read_to_string(data_dir.join(FILE))
        .ok()
        .and_then(|text| serde_json::from_str::<File>(&text).ok())
        .map(|file| Ports {
            redis: port_of(&file.redis),
            cache_redis: port_of(&file.cache_redis),
            database: port_of(&file.database),
        })
        .unwrap_or_default()
}

/// The port in `scheme://user:password@host:port[/path]`.
fn port_of(url: &str) -> Option<u16> {
    let (_, host) = url.rsplit_once('@')?;
    let (_, port) = host.split('/').next()?.rsplit_once(':')?;
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::port_of;

    #[test]
    fn ports_are_read_back_from_urls() {
        assert_eq!(port_of("redis://default:pw@127.0.0.1:6400"), Some(6400));
        assert_eq!(
            port_of("postgres://stockade:pw@127.0.0.1:5499/stockade"),
            Some(5499)
        );
        assert_eq!(port_of("redis://127.0.0.1"), None);
    }
}
