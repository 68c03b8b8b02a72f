//! Access tokens: signed here or by whoever shares the secret, verified without a database.

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, crypto, encode, errors::ErrorKind,
};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use uuid::Uuid;

use super::Role;
use crate::clock;

/// Who signs and who is meant: one word for both, since one system does both.
pub const ISSUER: &str = "stockade";

/// The media type of an access token (RFC 9068): no other kind of token passes for one.
const TYPE: &str = "at+jwt";

/// The longest life of a token minted here, in seconds.
pub const LIFETIME_MAX_SECONDS: u32 = 600;

/// The shortest secret, in bytes: as long as the hash.
pub const SECRET_MIN_BYTES: usize = 32;

/// How far the clocks of signer and verifier may be apart, in seconds.
pub(super) const LEEWAY_SECONDS: i64 = 30;

/// What of a token's header decides whether to believe it.
#[derive(Deserialize)]
pub(super) struct TokenHeader {
    pub(super) alg: Algorithm,
    pub(super) typ: Option<String>,
    pub(super) kid: Option<String>,
    // A token that brings or points to a key of its own, or asks for an extension that must be
    // understood, is refused rather than read without it.
    jku: Option<IgnoredAny>,
    jwk: Option<IgnoredAny>,
    x5u: Option<IgnoredAny>,
    x5c: Option<IgnoredAny>,
    crit: Option<IgnoredAny>,
    zip: Option<IgnoredAny>,
}

impl TokenHeader {
    /// Whether it is an access token of the one kind that is read here: the algorithm is the
    /// server's choice, never the token's.
    fn is_plain(&self) -> bool {
        self.alg == Algorithm::HS256
            && self
                .typ
                .as_ref()
                .is_some_and(|typ| typ.eq_ignore_ascii_case(TYPE))
            && self.is_self_contained()
    }

    /// Whether it neither brings a key nor points to one, and needs nothing to be understood.
    pub(super) fn is_self_contained(&self) -> bool {
        self.jku.is_none()
            && self.jwk.is_none()
            && self.x5u.is_none()
            && self.x5c.is_none()
            && self.crit.is_none()
            && self.zip.is_none()
    }
}

/// What a token says, in as few words as it takes: nothing personal.
#[derive(Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    sub: Uuid,
    role: Role,
    iat: i64,
    exp: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    nbf: Option<f64>,
    jti: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sid: Option<Uuid>,
    /// When the account was made, in seconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    registered_at: Option<i64>,
}

impl Claims {
    /// Whether they are meant for us and hold at this instant, in seconds since the Unix epoch.
    fn hold(&self, now: i64) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "seconds are far below 2^53")]
        let latest = (now + LEEWAY_SECONDS) as f64;
        self.iss == ISSUER
            && self.aud.is(ISSUER)
            && self.exp >= now - LEEWAY_SECONDS
            && self.nbf.is_none_or(|nbf| nbf <= latest)
            && !self.jti.is_empty()
    }
}

/// For whom a token is meant: one, or several of whom this is one.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Audience {
    fn is(&self, whom: &str) -> bool {
        match self {
            Self::One(one) => one == whom,
            Self::Several(several) => several.iter().any(|one| one == whom),
        }
    }
}

/// Reads a part of a token.
pub(super) fn part<T: DeserializeOwned>(text: &str) -> Result<T, Invalid> {
    let json = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| Invalid)?;
    serde_json::from_slice(&json).map_err(|_| Invalid)
}

/// Who a verified token speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user, registered here or not.
    pub user: Uuid,
    /// What the user may do.
    pub role: Role,
    /// The session that the token was minted in, if it was here.
    pub session: Option<Uuid>,
    /// When the account was made, in seconds since the Unix epoch, if whoever vouches for the user
    /// says so.
    pub registered_at: Option<i64>,
}

/// The token is not one to believe. There is one such answer, whatever is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access token is not valid")]
pub struct Invalid;

/// Why keys cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is no key.
    #[error("there is no key to sign access tokens with")]
    None,
    /// A secret that could be guessed.
    #[error("a secret for access tokens has at least {SECRET_MIN_BYTES} bytes")]
    Short,
    /// Longer than a token may live.
    #[error("an access token lives 1 to {LIFETIME_MAX_SECONDS} seconds")]
    Lifetime,
}

/// A secret that signs, with the name that tokens call it by.
pub struct Secret<'a> {
    /// `kid`; a token without one is tried with every key.
    pub id: &'a str,
    /// The key: these bytes as they are.
    pub bytes: &'a [u8],
}

struct Key {
    id: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
}

/// Shows which key it is, never what it is made of.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// The keys in use: the first signs, all verify.
#[derive(Debug)]
pub struct TokenKeys {
    keys: Vec<Key>,
    lifetime_seconds: u32,
}

impl TokenKeys {
    /// Keys for HS256, the one that signs first. During a rotation there are two.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(secrets: &[Secret<'_>], lifetime_seconds: u32) -> Result<Self, KeyError> {
        if secrets.is_empty() {
            return Err(KeyError::None);
        }
        if secrets
            .iter()
            .any(|secret| secret.bytes.len() < SECRET_MIN_BYTES)
        {
            return Err(KeyError::Short);
        }
        if !(1..=LIFETIME_MAX_SECONDS).contains(&lifetime_seconds) {
            return Err(KeyError::Lifetime);
        }
        let keys = secrets
            .iter()
            .map(|secret| Key {
                id: secret.id.to_owned(),
                encoding: EncodingKey::from_secret(secret.bytes),
                decoding: DecodingKey::from_secret(secret.bytes),
            })
            .collect();
        Ok(Self {
            keys,
            lifetime_seconds,
        })
    }

    /// How long a minted token lives, in seconds.
    pub fn lifetime_seconds(&self) -> u32 {
        self.lifetime_seconds
    }

    /// Signs a token for `identity` with the id `jti`.
    ///
    /// # Errors
    /// The library's, when it cannot sign: a mistake of ours.
    pub fn mint(
        &self,
        identity: Identity,
        jti: Uuid,
        now: DateTime<Utc>,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let Some(key) = self.keys.first() else {
            return Err(ErrorKind::InvalidKeyFormat.into());
        };
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some(TYPE.to_owned());
        header.kid = Some(key.id.clone());
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: Audience::One(ISSUER.to_owned()),
            sub: identity.user,
            role: identity.role,
            iat: now.timestamp(),
            exp: now.timestamp() + i64::from(self.lifetime_seconds),
            nbf: None,
            jti: jti.to_string(),
            sid: identity.session,
            registered_at: identity.registered_at,
        };
        encode(&header, &claims, &key.encoding)
    }

    /// Reads a token: each part once, and its claims only after its signature. Every purchase comes
    /// by here, and the library's own `decode` reads each part twice.
    ///
    /// # Errors
    /// [`Invalid`], whatever is wrong with it.
    pub fn verify(&self, token: &str) -> Result<Identity, Invalid> {
        let (message, signature) = token.rsplit_once('.').ok_or(Invalid)?;
        let (header, claims) = message.split_once('.').ok_or(Invalid)?;
        let header: TokenHeader = part(header)?;
        if !header.is_plain() {
            return Err(Invalid);
        }
        let signed_by = |key: &Key| {
            header.kid.as_ref().is_none_or(|kid| *kid == key.id)
                && crypto::verify(signature, message.as_bytes(), &key.decoding, header.alg)
                    .unwrap_or(false)
        };
        if !self.keys.iter().any(signed_by) {
            return Err(Invalid);
        }
        let claims: Claims = part(claims)?;
        if !claims.hold(clock::now().timestamp()) {
            return Err(Invalid);
        }
        Ok(Identity {
            user: claims.sub,
            role: claims.role,
            session: claims.sid,
            registered_at: claims.registered_at,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use hmac::{Hmac, KeyInit, Mac};
    use serde_json::{Value, json};
    use sha2::{Sha256, Sha512};

    use super::*;

    pub(crate) const SECRET: &[u8] = b"a secret of the tests, 32 bytes!";
    const OLD_SECRET: &[u8] = b"the secret before it, also long!";

    pub(crate) fn keys() -> TokenKeys {
        let current = Secret {
            id: "current",
            bytes: SECRET,
        };
        let old = Secret {
            id: "old",
            bytes: OLD_SECRET,
        };
        TokenKeys::new(&[current, old], LIFETIME_MAX_SECONDS).unwrap()
    }

    fn signed(header: &Value, claims: &Value, secret: &[u8]) -> String {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
        mac.update(message.as_bytes());
        format!(
            "{message}.{}",
            BASE64_URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
        )
    }

    fn header() -> Value {
        json!({"alg": "HS256", "typ": "at+jwt"})
    }

    fn claims() -> Value {
        let now = clock::now().timestamp();
        json!({
            "iss": "stockade", "aud": "stockade", "sub": Uuid::from_u128(7), "role": "buyer",
            "iat": now, "exp": now + 600, "jti": "one"
        })
    }

    fn with(mut value: Value, name: &str, member: Value) -> Value {
        value[name] = member;
        value
    }

    fn without(mut value: Value, name: &str) -> Value {
        value.as_object_mut().unwrap().remove(name);
        value
    }

    /// Tokens that somebody could try, each with what is wrong with it.
    pub(crate) fn forged() -> Vec<(&'static str, String)> {
        let now = clock::now().timestamp();
        let good = signed(&header(), &claims(), SECRET);
        let (message, signature) = good.rsplit_once('.').unwrap();
        let (head, body) = message.split_once('.').unwrap();
        let none = |alg: &str| {
            let header = with(header(), "alg", json!(alg));
            let unsigned = signed(&header, &claims(), SECRET);
            format!("{}.", unsigned.rsplit_once('.').unwrap().0)
        };
        let sha512 = {
            let head =
                BASE64_URL_SAFE_NO_PAD.encode(with(header(), "alg", json!("HS512")).to_string());
            let message = format!("{head}.{body}");
            let mut mac = Hmac::<Sha512>::new_from_slice(SECRET).unwrap();
            mac.update(message.as_bytes());
            format!(
                "{message}.{}",
                BASE64_URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
            )
        };
        let admin =
            BASE64_URL_SAFE_NO_PAD.encode(with(claims(), "role", json!("admin")).to_string());
        let head_with =
            |name: &str, value: Value| signed(&with(header(), name, value), &claims(), SECRET);
        let claim =
            |name: &str, value: Value| signed(&header(), &with(claims(), name, value), SECRET);
        let lacking = |name: &str| signed(&header(), &without(claims(), name), SECRET);
        vec![
            ("nothing", String::new()),
            ("no token", "token".into()),
            ("two parts", message.to_owned()),
            ("four parts", format!("{good}.{signature}")),
            ("no signature", format!("{message}.")),
            (
                "another signature",
                format!("{message}.{}", signature.chars().rev().collect::<String>()),
            ),
            ("another body", format!("{head}.{admin}.{signature}")),
            (
                "another secret",
                signed(&header(), &claims(), b"somebody else's secret, also long"),
            ),
            ("empty secret", signed(&header(), &claims(), b"")),
            ("alg none", none("none")),
            ("alg None", none("None")),
            ("alg empty", none("")),
            (
                "alg RS256, signed with the secret",
                head_with("alg", json!("RS256")),
            ),
            (
                "alg ES256, signed with the secret",
                head_with("alg", json!("ES256")),
            ),
            ("alg HS512 with the right secret", sha512),
            ("alg hs256", head_with("alg", json!("hs256"))),
            (
                "no alg",
                signed(&without(header(), "alg"), &claims(), SECRET),
            ),
            ("typ JWT", head_with("typ", json!("JWT"))),
            ("typ rt+jwt", head_with("typ", json!("rt+jwt"))),
            (
                "no typ",
                signed(&without(header(), "typ"), &claims(), SECRET),
            ),
            ("unknown kid", head_with("kid", json!("unknown"))),
            ("kid of another key", head_with("kid", json!("old"))),
            (
                "kid that is a path",
                head_with("kid", json!("../../dev/null")),
            ),
            ("jku", head_with("jku", json!("https://example.org/keys"))),
            ("x5u", head_with("x5u", json!("https://example.org/key"))),
            ("x5c", head_with("x5c", json!(["AA=="]))),
            (
                "jwk",
                head_with(
                    "jwk",
                    json!({"kty": "oct", "k": BASE64_URL_SAFE_NO_PAD.encode(SECRET)}),
                ),
            ),
            ("crit", head_with("crit", json!(["exp"]))),
            ("expired", claim("exp", json!(now - 60))),
            ("no exp", lacking("exp")),
            ("exp is a text", claim("exp", json!("tomorrow"))),
            ("exp below zero", claim("exp", json!(-1))),
            ("not yet", claim("nbf", json!(now + 600))),
            ("nbf is a text", claim("nbf", json!("soon"))),
            ("another issuer", claim("iss", json!("somebody"))),
            (
                "several issuers",
                claim("iss", json!(["stockade", "somebody"])),
            ),
            ("no issuer", lacking("iss")),
            ("another audience", claim("aud", json!("somebody"))),
            ("no audience", lacking("aud")),
            ("empty audience", claim("aud", json!([]))),
            ("no subject", lacking("sub")),
            ("subject is no UUID", claim("sub", json!("{p0}"))),
            ("unknown role", claim("role", json!("root"))),
            ("role in capitals", claim("role", json!("ADMIN"))),
            ("no role", lacking("role")),
            ("no iat", lacking("iat")),
            ("no jti", lacking("jti")),
            ("empty jti", claim("jti", json!(""))),
            ("session is no UUID", claim("sid", json!("1"))),
            ("account of some day", claim("registered_at", json!("once"))),
        ]
    }

    #[test]
    fn a_minted_token_says_who_it_speaks_for_and_nothing_personal() {
        let keys = keys();
        let identity = Identity {
            user: Uuid::from_u128(1),
            role: Role::Operator,
            session: Some(Uuid::from_u128(2)),
            registered_at: Some(4),
        };
        let token = keys
            .mint(identity, Uuid::from_u128(3), clock::now())
            .unwrap();
        assert_eq!(keys.verify(&token), Ok(identity));
        let body = BASE64_URL_SAFE_NO_PAD
            .decode(token.split('.').nth(1).unwrap())
            .unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        let mut names: Vec<_> = body
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "aud",
                "exp",
                "iat",
                "iss",
                "jti",
                "registered_at",
                "role",
                "sid",
                "sub"
            ]
        );
        assert_eq!(
            body["exp"].as_i64().unwrap() - body["iat"].as_i64().unwrap(),
            600
        );
    }

    #[test]
    fn tokens_of_every_active_key_and_of_other_signers_are_read() {
        let keys = keys();
        let now = clock::now().timestamp();
        for (case, token) in [
            ("no kid", signed(&header(), &claims(), SECRET)),
            ("no kid, old key", signed(&header(), &claims(), OLD_SECRET)),
            (
                "old kid",
                signed(&with(header(), "kid", json!("old")), &claims(), OLD_SECRET),
            ),
            (
                "typ in capitals",
                signed(&with(header(), "typ", json!("AT+JWT")), &claims(), SECRET),
            ),
            (
                "several audiences",
                signed(
                    &header(),
                    &with(claims(), "aud", json!(["x", "stockade"])),
                    SECRET,
                ),
            ),
            (
                "nbf passed",
                signed(&header(), &with(claims(), "nbf", json!(now - 1)), SECRET),
            ),
            (
                "just expired",
                signed(&header(), &with(claims(), "exp", json!(now - 20)), SECRET),
            ),
            (
                "further claims",
                signed(&header(), &with(claims(), "scope", json!("x")), SECRET),
            ),
        ] {
            assert_eq!(
                keys.verify(&token).map(|identity| identity.user),
                Ok(Uuid::from_u128(7)),
                "{case}"
            );
        }
    }

    #[test]
    fn forged_tokens_are_refused() {
        let keys = keys();
        let forged = forged();
        assert!(forged.len() >= 20);
        for (case, token) in forged {
            assert_eq!(keys.verify(&token), Err(Invalid), "{case}");
        }
    }

    #[test]
    fn weak_keys_and_long_lives_are_refused() {
        let key = || Secret {
            id: "a",
            bytes: SECRET,
        };
        let error = |secrets: &[Secret<'_>], lifetime| TokenKeys::new(secrets, lifetime).err();
        assert_eq!(error(&[], 600), Some(KeyError::None));
        assert_eq!(
            error(
                &[
                    key(),
                    Secret {
                        id: "b",
                        bytes: &SECRET[1..]
                    }
                ],
                600
            ),
            Some(KeyError::Short)
        );
        assert_eq!(error(&[key()], 601), Some(KeyError::Lifetime));
        assert_eq!(error(&[key()], 0), Some(KeyError::Lifetime));
        assert_eq!(error(&[key()], 1), None);
    }
}
