//! Refresh tokens: what they are made of, and how long the sessions behind them last.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::Duration;
use hmac::{Hmac, KeyInit, Mac};
use rand::{TryRngCore, rngs::OsRng};
use sha2::{Digest, Sha256};

use crate::store::sessions::{SessionLimits, TokenHash};

/// The end of a session, whatever its use.
pub const LIFETIME: Duration = Duration::days(30);

/// When a session ends without use, and how late the retry of a lost answer may be.
pub const LIMITS: SessionLimits = SessionLimits {
    idle: Duration::days(7),
    retry: Duration::seconds(10),
};

const BYTES: usize = 32;

/// A refresh token: 256 bits that say nothing. Whoever has it has the session.
pub struct RefreshToken([u8; BYTES]);

impl RefreshToken {
    /// The first token of a session.
    ///
    /// # Errors
    /// The operating system's, when it has no randomness.
    pub fn random() -> Result<Self, rand::rand_core::OsError> {
        let mut bytes = [0; BYTES];
        OsRng.try_fill_bytes(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a token as a client sent it; `None` when it cannot be one.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        bytes.try_into().ok().map(Self)
    }

    /// The token as a client gets it.
    pub fn text(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0)
    }

    /// What is stored of it.
    pub fn hash(&self) -> TokenHash {
        Sha256::digest(self.0).into()
    }
}

/// Derives each token's successor, so that the retry of a client that lost the answer gets the
/// same successor, though only its hash was stored.
pub struct Successors(Hmac<Sha256>);

impl Successors {
    /// Successors under `secret`: without it nobody can tell them from random ones.
    ///
    /// # Errors
    /// Never for a secret of any length; the library's signature says otherwise.
    pub fn new(secret: &[u8]) -> Result<Self, hmac::digest::InvalidLength> {
        let mut mac = Hmac::new_from_slice(secret)?;
        // The secret also signs access tokens; what it makes here is of another kind.
        mac.update(b"refresh token successor");
        Ok(Self(mac))
    }

    /// The token that follows `token`.
    pub fn of(&self, token: &RefreshToken) -> RefreshToken {
        let mut mac = self.0.clone();
        mac.update(&token.0);
        RefreshToken(mac.finalize().into_bytes().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_nothing_else_is_one() {
        let token = RefreshToken::random().unwrap();
        assert_eq!(
            RefreshToken::parse(&token.text()).unwrap().hash(),
            token.hash()
        );
        let text = token.text();
        for bad in [
            "",
            "x",
            &text[1..],
            &format!("{text}A"),
            &format!("{text}="),
            "a.b.c",
            &"é".repeat(43),
        ] {
            assert!(RefreshToken::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_successor_depends_on_token_and_secret() {
        let token = RefreshToken::random().unwrap();
        let one = Successors::new(b"one").unwrap();
        assert_eq!(one.of(&token).hash(), one.of(&token).hash());
        assert_ne!(one.of(&token).hash(), token.hash());
        assert_ne!(
            one.of(&token).hash(),
            Successors::new(b"two").unwrap().of(&token).hash()
        );
        assert_ne!(
            one.of(&token).hash(),
            one.of(&RefreshToken::random().unwrap()).hash()
        );
    }
}
