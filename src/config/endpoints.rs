//! Where the stores are.

use secrecy::SecretString;

/// The addresses of the stores, with their passwords.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// The Redis that decides.
    pub redis_url: SecretString,
    /// The Redis for what may be lost; absent only if the operator gave none.
    pub cache_redis_url: Option<SecretString>,
    /// The PostgreSQL that remembers.
    pub database_url: SecretString,
}
