//! Tokens of an identity provider elsewhere: its keys, fetched and kept, and what its claims mean
//! here.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use chrono::{DateTime, Utc};
use jsonwebtoken::{
    Algorithm, DecodingKey, crypto,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse},
};
use reqwest::{Client, StatusCode, header::ACCEPT, redirect::Policy};
use serde_json::Value;
use sha1::{Digest, Sha1};
use tokio::{sync::Mutex, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::{Builder, Uuid};

use super::{
    Role,
    bearer::BearerError,
    token::{Identity, Invalid, LEEWAY_SECONDS, TokenHeader, part},
};
use crate::clock;

/// The time between two looks at the provider's keys.
const LOOK: Duration = Duration::from_mins(5);

/// The time between two looks while there was no answer, and the shortest between two looks because
/// of a key that nobody knows: whoever makes up keys does not make us ask more often.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// How long the provider may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The largest answer, in bytes: a key has a few hundred, with certificates a few thousand.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// Keys that are read of an answer.
const KEYS_MAX: usize = 64;

/// The longest `sub`: what an identity provider may give.
const SUBJECT_BYTES_MAX: usize = 255;

/// Who the provider is, and what its claims mean.
#[derive(Clone, Debug)]
pub struct Provider {
    /// Where its keys are (a JWKS).
    pub keys_url: String,
    /// `iss` of its tokens.
    pub issuer: String,
    /// What `aud` of its tokens must have.
    pub audience: String,
    /// Where in the claims roles are, as a JSON pointer.
    pub roles: String,
    /// Where in the claims it is when the account was made, as a JSON pointer.
    pub registered_at: String,
    /// Roles that mean operator here.
    pub operators: Vec<String>,
    /// Roles that mean admin here.
    pub admins: Vec<String>,
}

/// A key that verifies, with the one algorithm that it is for.
struct Key {
    algorithm: Algorithm,
    decoding: DecodingKey,
}

type Keys = HashMap<String, Arc<Key>>;

/// Verifies the tokens of one provider.
pub struct Outside {
    provider: Provider,
    client: Client,
    /// By `kid`. The last ones that were there stay while the provider is not.
    keys: RwLock<Keys>,
    /// When the provider was last asked: one asks, the others wait for what it learns.
    asked_at: Mutex<Option<Instant>>,
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.provider.fmt(f)
    }
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
enum NoKeys {
    #[error("{0}")]
    Http(reqwest::Error),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("the answer does not end")]
    Long,
    #[error("the answer is no set of keys")]
    Unreadable,
    #[error("none of the keys is for RS256 or ES256, with a `kid`")]
    None,
}

impl From<reqwest::Error> for NoKeys {
    fn from(error: reqwest::Error) -> Self {
        Self::Http(error)
    }
}

impl Outside {
    /// The tokens of this provider.
    ///
    /// # Errors
    /// The library's, when there is no TLS.
    pub fn new(provider: Provider) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .timeout(ANSWER_MAX)
            // Whoever may send us elsewhere may give us keys.
            .redirect(Policy::none())
            .user_agent(concat!("stockade/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self {
            provider,
            client,
            keys: RwLock::default(),
            asked_at: Mutex::default(),
        })
    }

    /// Keeps the keys fresh, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let looking = async {
            loop {
                let mut asked_at = self.asked_at.lock().await;
                let found = self.look(&mut asked_at).await;
                drop(asked_at);
                tokio::time::sleep(if found { LOOK } else { LOOK_AGAIN }).await;
            }
        };
        stop.run_until_cancelled(looking).await;
    }

    /// Who a token speaks for.
    ///
    /// # Errors
    /// [`BearerError::Invalid`], whatever is wrong with it; [`BearerError::Provider`] when there is
    /// no key because the provider has never answered.
    pub async fn verify(&self, token: &str) -> Result<Identity, BearerError> {
        let (message, signature) = token.rsplit_once('.').ok_or(Invalid)?;
        let (header, claims) = message.split_once('.').ok_or(Invalid)?;
        let header: TokenHeader = part(header)?;
        let kid = header.kid.as_deref().filter(|_| is_ours(&header));
        let key = self.key(kid.ok_or(Invalid)?).await?;
        let genuine = key.algorithm == header.alg
            && crypto::verify(signature, message.as_bytes(), &key.decoding, key.algorithm)
                .unwrap_or(false);
        if !genuine {
            return Err(BearerError::Invalid);
        }
        let claims: Value = part(claims)?;
        Ok(self.provider.understand(&claims, clock::now())?)
    }

    /// The key with this name; perhaps it is so new that the provider has to be asked.
    async fn key(&self, kid: &str) -> Result<Arc<Key>, BearerError> {
        if let Some(key) = self.known(kid) {
            return Ok(key);
        }
        let mut asked_at = self.asked_at.lock().await;
        let lately = asked_at.is_some_and(|at| at.elapsed() < LOOK_AGAIN);
        if self.known(kid).is_none() && !lately {
            self.look(&mut asked_at).await;
        }
        drop(asked_at);
        match self.known(kid) {
            Some(key) => Ok(key),
            None if self.read().is_empty() => Err(BearerError::Provider),
            None => Err(BearerError::Invalid),
        }
    }

    /// Asks the provider; whether it answered.
    async fn look(&self, asked_at: &mut Option<Instant>) -> bool {
        *asked_at = Some(Instant::now());
        match self.fetch().await {
            Ok(keys) => {
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
                true
            }
            Err(error) => {
                let known = self.read().len();
                tracing::warn!(
                    %error,
                    url = self.provider.keys_url,
                    known,
                    "the identity provider gave no keys: those that are known stay"
                );
                false
            }
        }
    }

    async fn fetch(&self) -> Result<Keys, NoKeys> {
        let request = self.client.get(&self.provider.keys_url);
        let mut response = request.header(ACCEPT, "application/json").send().await?;
        if response.status() != StatusCode::OK {
            return Err(NoKeys::Status(response.status()));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(NoKeys::Long);
            }
            bytes.extend_from_slice(&chunk);
        }
        let keys = read_keys(&bytes)?;
        if keys.is_empty() {
            return Err(NoKeys::None);
        }
        Ok(keys)
    }

    fn known(&self, kid: &str) -> Option<Arc<Key>> {
        self.read().get(kid).cloned()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Keys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it is a token of a kind that is read here: an access token, or one that does not say.
fn is_ours(header: &TokenHeader) -> bool {
    let kind = header.typ.as_deref().unwrap_or("JWT");
    let kind = kind.strip_prefix("application/").unwrap_or(kind);
    matches!(header.alg, Algorithm::RS256 | Algorithm::ES256)
        && ["JWT", "at+jwt"]
            .iter()
            .any(|it| it.eq_ignore_ascii_case(kind))
        && header.is_self_contained()
}

/// The keys of an answer that can be used; a provider may have others for others.
fn read_keys(bytes: &[u8]) -> Result<Keys, NoKeys> {
    let set: Value = serde_json::from_slice(bytes).map_err(|_| NoKeys::Unreadable)?;
    let set = set["keys"].as_array().ok_or(NoKeys::Unreadable)?;
    let mut keys = Keys::new();
    for key in set.iter().take(KEYS_MAX) {
        if let Ok(jwk) = serde_json::from_value::<Jwk>(key.clone())
            && let Some((kid, key)) = usable(&jwk)
        {
            // The first of a name stays.
            keys.entry(kid).or_insert_with(|| Arc::new(key));
        }
    }
    Ok(keys)
}

/// A public key for one of the two algorithms, with a name; what a key is says which it is for.
fn usable(jwk: &Jwk) -> Option<(String, Key)> {
    let (algorithm, named) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        _ => return None,
    };
    let common = &jwk.common;
    let verifies = common.key_algorithm.is_none_or(|it| it == named)
        && common
            .public_key_use
            .as_ref()
            .is_none_or(|it| *it == PublicKeyUse::Signature)
        && common
            .key_operations
            .as_ref()
            .is_none_or(|it| it.contains(&KeyOperations::Verify));
    let kid = common.key_id.clone().filter(|kid| !kid.is_empty())?;
    let decoding = DecodingKey::from_jwk(jwk).ok()?;
    let key = Key {
        algorithm,
        decoding,
    };
    verifies.then_some((kid, key))
}

impl Provider {
    /// Who signed claims speak for, if they are meant for us and hold.
    fn understand(&self, claims: &Value, now: DateTime<Utc>) -> Result<Identity, Invalid> {
        let now = now.timestamp();
        #[expect(clippy::cast_precision_loss, reason = "seconds are far below 2^53")]
        let (earliest, latest) = ((now - LEEWAY_SECONDS) as f64, (now + LEEWAY_SECONDS) as f64);
        let audience = &claims["aud"];
        let meant = match audience {
            Value::String(one) => *one == self.audience,
            Value::Array(several) => several.iter().any(|one| *one == self.audience.as_str()),
            _ => false,
        };
        let begun = match &claims["nbf"] {
            Value::Null => true,
            nbf => nbf.as_f64().is_some_and(|nbf| nbf <= latest),
        };
        let lasts = claims["exp"].as_f64().is_some_and(|exp| exp >= earliest);
        let subject = claims["sub"].as_str().unwrap_or_default();
        let named = (1..=SUBJECT_BYTES_MAX).contains(&subject.len());
        if claims["iss"] != self.issuer.as_str() || !meant || !begun || !lasts || !named {
            return Err(Invalid);
        }
        Ok(Identity {
            user: self.user(subject),
            role: self.role(claims),
            session: None,
            registered_at: self.registered_at(claims),
        })
    }

    /// When the account was made: seconds since the Unix epoch, or RFC 3339.
    fn registered_at(&self, claims: &Value) -> Option<i64> {
        match claims.pointer(&self.registered_at)? {
            Value::String(text) => Some(DateTime::parse_from_rfc3339(text).ok()?.timestamp()),
            #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
            number => Some(number.as_f64()? as i64),
        }
    }

    /// The user: a subject that is a UUID, or the UUID (version 5) of issuer and subject.
    fn user(&self, subject: &str) -> Uuid {
        let same = |id: &Uuid| id.to_string() == subject;
        Uuid::try_parse(subject)
            .ok()
            .filter(same)
            .unwrap_or_else(|| {
                let issuer = named(Uuid::NAMESPACE_URL, &self.issuer);
                named(issuer, subject)
            })
    }

    /// The highest role that one of the provider's means here.
    fn role(&self, claims: &Value) -> Role {
        let has = |meaning: &[String]| {
            let means = |role: &str| meaning.iter().any(|it| it == role);
            match claims.pointer(&self.roles) {
                Some(Value::String(roles)) => roles.split_whitespace().any(means),
                Some(Value::Array(roles)) => roles.iter().filter_map(Value::as_str).any(means),
                _ => false,
            }
        };
        if has(&self.admins) {
            Role::Admin
        } else if has(&self.operators) {
            Role::Operator
        } else {
            Role::Buyer
        }
    }
}

/// The UUID, version 5, of a name (RFC 9562).
fn named(space: Uuid, name: &str) -> Uuid {
    let hash = Sha1::new()
        .chain_update(space.as_bytes())
        .chain_update(name)
        .finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    Builder::from_sha1_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        rsa::{KeyPair as RsaKey, KeySize},
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256},
    };
    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
    use hmac::{Hmac, KeyInit, Mac};
    use serde_json::json;
    use sha2::Sha256;

    use super::*;

    fn encoded(bytes: impl AsRef<[u8]>) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    fn rsa_jwk(key: &RsaKey, kid: &str) -> Value {
        let public = key.public_key();
        json!({
            "kty": "RSA", "kid": kid, "use": "sig",
            "n": encoded(public.modulus().big_endian_without_leading_zero()),
            "e": encoded(public.exponent().big_endian_without_leading_zero()),
        })
    }

    fn ec_jwk(key: &EcdsaKeyPair, kid: &str) -> Value {
        let point = key.public_key().as_ref();
        json!({
            "kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256",
            "x": encoded(&point[1..33]), "y": encoded(&point[33..65]),
        })
    }

    fn message(header: &Value, claims: &Value) -> String {
        format!(
            "{}.{}",
            encoded(header.to_string()),
            encoded(claims.to_string())
        )
    }

    fn by_rsa(key: &RsaKey, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let mut signature = vec![0; key.public_modulus_len()];
        let random = SystemRandom::new();
        key.sign(
            &RSA_PKCS1_SHA256,
            &random,
            message.as_bytes(),
            &mut signature,
        )
        .unwrap();
        format!("{message}.{}", encoded(signature))
    }

    fn by_ec(key: &EcdsaKeyPair, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let signature = key.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
        format!("{message}.{}", encoded(signature))
    }

    fn by_secret(secret: &[u8], header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
        mac.update(message.as_bytes());
        format!("{message}.{}", encoded(mac.finalize().into_bytes()))
    }

    fn provider() -> Provider {
        Provider {
            // The port of the discard service, where nothing listens.
            keys_url: "http://127.0.0.1:9/keys".to_owned(),
            issuer: "https://id.example.org/".to_owned(),
            audience: "shop".to_owned(),
            roles: "/realm/roles".to_owned(),
            registered_at: "/account/made".to_owned(),
            operators: vec!["seller".to_owned()],
            admins: vec!["boss".to_owned(), "root".to_owned()],
        }
    }

    fn claims() -> Value {
        let now = clock::now().timestamp();
        json!({
            "iss": "https://id.example.org/", "aud": "shop", "sub": "auth0|7", "exp": now + 600,
            "iat": now, "realm": {"roles": ["customer"]},
        })
    }

    fn with(mut value: Value, name: &str, member: Value) -> Value {
        value[name] = member;
        value
    }

    struct Keyring {
        rsa: RsaKey,
        ec: EcdsaKeyPair,
        outside: Outside,
    }

    impl Keyring {
        fn new() -> Self {
            let rsa = RsaKey::generate(KeySize::Rsa2048).unwrap();
            let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
            let set = json!({"keys": [rsa_jwk(&rsa, "r"), ec_jwk(&ec, "e")]});
            let outside = Outside::new(provider()).unwrap();
            *outside.keys.write().unwrap() = read_keys(set.to_string().as_bytes()).unwrap();
            Self { rsa, ec, outside }
        }
    }

    #[tokio::test]
    async fn tokens_of_the_provider_are_understood() {
        let Keyring { rsa, ec, outside } = Keyring::new();
        let of_rsa = json!({"alg": "RS256", "kid": "r", "typ": "at+jwt"});
        let of_ec = json!({"alg": "ES256", "kid": "e"});
        // Computed with another implementation of RFC 9562.
        let user = named(
            named(Uuid::NAMESPACE_URL, "https://id.example.org/"),
            "auth0|7",
        );
        assert_eq!(
            named(Uuid::NAMESPACE_DNS, "www.example.com").to_string(),
            "2ed6657d-e927-568b-95e1-2665a8aea6a2"
        );
        let plain = Uuid::from_u128(7);
        for (claims, user, role) in [
            (claims(), user, Role::Buyer),
            (
                with(claims(), "aud", json!(["x", "shop"])),
                user,
                Role::Buyer,
            ),
            (with(claims(), "sub", json!(plain)), plain, Role::Buyer),
            (
                with(claims(), "realm", json!({"roles": ["x", "seller"]})),
                user,
                Role::Operator,
            ),
            (
                with(claims(), "realm", json!({"roles": "seller root"})),
                user,
                Role::Admin,
            ),
            (
                with(claims(), "realm", json!({"roles": ["Boss", 7]})),
                user,
                Role::Buyer,
            ),
            (with(claims(), "realm", json!("boss")), user, Role::Buyer),
        ] {
            for token in [by_rsa(&rsa, &of_rsa, &claims), by_ec(&ec, &of_ec, &claims)] {
                let identity = outside.verify(&token).await.unwrap();
                assert_eq!((identity.user, identity.role), (user, role), "{claims}");
                assert_eq!(identity.session, None);
            }
        }
        for (made, registered_at) in [
            (json!(1_700_000_000), Some(1_700_000_000)),
            (json!(1_700_000_000.9), Some(1_700_000_000)),
            (json!("2023-11-14T22:13:20Z"), Some(1_700_000_000)),
            (json!("2023-11-14"), None),
            (json!(true), None),
            (Value::Null, None),
        ] {
            let claims = with(claims(), "account", json!({ "made": made }));
            let identity = outside.verify(&by_rsa(&rsa, &of_rsa, &claims)).await;
            assert_eq!(identity.unwrap().registered_at, registered_at, "{made}");
        }
        // The same subject spelt differently is another one.
        let spelt = with(claims(), "sub", json!(plain.simple().to_string()));
        let identity = outside.verify(&by_rsa(&rsa, &of_rsa, &spelt)).await;
        assert_ne!(identity.unwrap().user, plain);
    }

    #[tokio::test]
    async fn forged_tokens_of_the_provider_are_refused() {
        let Keyring { rsa, ec, outside } = Keyring::new();
        *outside.asked_at.lock().await = Some(Instant::now());
        let header = json!({"alg": "RS256", "kid": "r", "typ": "JWT"});
        let head = |name: &str, value: Value| with(header.clone(), name, value);
        let now = clock::now().timestamp();
        let stranger = RsaKey::generate(KeySize::Rsa2048).unwrap();
        let public = {
            use aws_lc_rs::encoding::AsDer;
            let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = rsa.public_key().as_der().unwrap();
            der.as_ref().to_vec()
        };
        let modulus = rsa.public_key().modulus();
        let modulus = modulus.big_endian_without_leading_zero();
        let good = by_rsa(&rsa, &header, &claims());
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let (_, body) = signed.split_once('.').unwrap();
        let swapped =
            |header: &Value| format!("{}.{body}.{signature}", encoded(header.to_string()));
        let unnamed = json!({"alg": "RS256"});
        let claim = |name: &str, value: Value| by_rsa(&rsa, &header, &with(claims(), name, value));
        let cases = [
            (
                "HS256 with the public key as secret",
                by_secret(&public, &head("alg", json!("HS256")), &claims()),
            ),
            (
                "HS256 with the modulus as secret",
                by_secret(modulus, &head("alg", json!("HS256")), &claims()),
            ),
            (
                "HMAC under the name RS256",
                by_secret(&public, &header, &claims()),
            ),
            (
                "alg none",
                format!("{}.", message(&head("alg", json!("none")), &claims())),
            ),
            ("no signature", format!("{signed}.")),
            (
                "alg swapped afterwards",
                swapped(&head("alg", json!("ES256"))),
            ),
            (
                "RS512",
                by_rsa(&rsa, &head("alg", json!("RS512")), &claims()),
            ),
            (
                "PS256",
                by_rsa(&rsa, &head("alg", json!("PS256")), &claims()),
            ),
            (
                "RSA under the EC key's name",
                by_rsa(&rsa, &head("kid", json!("e")), &claims()),
            ),
            (
                "RSA under the EC key's name and algorithm",
                by_rsa(&rsa, &json!({"alg": "ES256", "kid": "e"}), &claims()),
            ),
            (
                "EC under the RSA key's name",
                by_ec(&ec, &json!({"alg": "ES256", "kid": "r"}), &claims()),
            ),
            ("EC as RSA", by_ec(&ec, &header, &claims())),
            (
                "unknown kid",
                by_rsa(&rsa, &head("kid", json!("x")), &claims()),
            ),
            (
                "empty kid",
                by_rsa(&rsa, &head("kid", json!("")), &claims()),
            ),
            (
                "kid is a number",
                by_rsa(&rsa, &head("kid", json!(1)), &claims()),
            ),
            ("no kid", by_rsa(&rsa, &unnamed, &claims())),
            (
                "another key under the right kid",
                by_rsa(&stranger, &header, &claims()),
            ),
            (
                "a key of its own",
                by_rsa(&stranger, &head("jwk", rsa_jwk(&stranger, "r")), &claims()),
            ),
            (
                "jku",
                by_rsa(
                    &rsa,
                    &head("jku", json!("https://evil.example/keys")),
                    &claims(),
                ),
            ),
            (
                "x5u",
                by_rsa(
                    &rsa,
                    &head("x5u", json!("https://evil.example/key")),
                    &claims(),
                ),
            ),
            (
                "x5c",
                by_rsa(&rsa, &head("x5c", json!(["AA=="])), &claims()),
            ),
            (
                "crit",
                by_rsa(&rsa, &head("crit", json!(["exp"])), &claims()),
            ),
            ("zip", by_rsa(&rsa, &head("zip", json!("DEF")), &claims())),
            (
                "typ of a logout",
                by_rsa(&rsa, &head("typ", json!("logout+jwt")), &claims()),
            ),
            (
                "another issuer",
                claim("iss", json!("https://id.example.org")),
            ),
            ("our own issuer", claim("iss", json!("stockade"))),
            ("another audience", claim("aud", json!("shop2"))),
            ("empty audience", claim("aud", json!([]))),
            ("no audience", claim("aud", Value::Null)),
            ("expired", claim("exp", json!(now - 60))),
            ("no end", claim("exp", Value::Null)),
            ("end is a text", claim("exp", json!("tomorrow"))),
            ("not yet", claim("nbf", json!(now + 600))),
            ("nbf is a text", claim("nbf", json!("soon"))),
            ("no subject", claim("sub", Value::Null)),
            ("empty subject", claim("sub", json!(""))),
            ("long subject", claim("sub", json!("x".repeat(256)))),
            ("subject is a number", claim("sub", json!(7))),
        ];
        for (case, token) in cases {
            let answer = outside.verify(&token).await;
            assert!(
                matches!(answer, Err(BearerError::Invalid)),
                "{case}: {answer:?}"
            );
        }
        outside.verify(&good).await.unwrap();
        // Without any key it is not known whether it is genuine.
        outside.keys.write().unwrap().clear();
        let answer = outside.verify(&good).await;
        assert!(matches!(answer, Err(BearerError::Provider)), "{answer:?}");
    }

    #[test]
    fn only_keys_that_verify_are_taken() {
        let Keyring { rsa, ec, .. } = Keyring::new();
        let (rsa, ec) = (rsa_jwk(&rsa, "r"), ec_jwk(&ec, "e"));
        let symmetric = json!({"kty": "oct", "kid": "s", "k": "c2VjcmV0", "alg": "HS256"});
        let found = |keys: Value| {
            let keys = read_keys(json!({"keys": keys}).to_string().as_bytes()).unwrap();
            let mut names: Vec<_> = keys.into_keys().collect();
            names.sort_unstable();
            names.concat()
        };
        for (keys, names) in [
            (json!([rsa, ec]), "er"),
            (json!([symmetric, rsa]), "r"),
            (json!([with(rsa.clone(), "use", json!("enc"))]), ""),
            (json!([with(rsa.clone(), "alg", json!("RS512"))]), ""),
            (json!([with(rsa.clone(), "alg", json!("PS256"))]), ""),
            (json!([with(rsa.clone(), "alg", json!("RS256"))]), "r"),
            (
                json!([with(rsa.clone(), "key_ops", json!(["encrypt"]))]),
                "",
            ),
            (json!([with(rsa.clone(), "kid", Value::Null)]), ""),
            (json!([with(rsa.clone(), "n", json!("!"))]), ""),
            (json!([with(ec.clone(), "crv", json!("P-384"))]), ""),
            (json!([{"kty": "new", "kid": "n"}, 7, null, rsa]), "r"),
            (json!([]), ""),
        ] {
            assert_eq!(found(keys.clone()), names, "{keys}");
        }
        for bad in ["", "[]", "{}", "<html>", r#"{"keys": {}}"#] {
            assert!(read_keys(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
