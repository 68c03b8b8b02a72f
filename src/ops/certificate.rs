//! Certificates of settled rounds: what they say, and the key that signs them.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, SecondsFormat, Utc};
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode,
    jwk::{AlgorithmParameters, Jwk},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::auditor::Seen;
use crate::{
    clock,
    store::{
        StoreError,
        endings::{Certificate, Ending, Endings},
    },
};

/// The media type in a certificate's header: no token of another kind passes for one.
const TYPE: &str = "stockade-certificate";

/// What stands before the 32 bytes of an Ed25519 key in PKCS#8 (RFC 8410).
const PKCS8_HEAD: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// A certificate or a key that is none, or does not fit the other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CertificateError(String);

impl From<jsonwebtoken::errors::Error> for CertificateError {
    fn from(error: jsonwebtoken::errors::Error) -> Self {
        Self(error.to_string())
    }
}

/// The Ed25519 key that signs certificates.
#[derive(Clone)]
pub struct CertificateKey {
    encoding: EncodingKey,
    id: String,
    public: String,
}

impl std::fmt::Debug for CertificateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl CertificateKey {
    /// The key that follows from a secret: every node with the same secret signs with the same.
    ///
    /// # Errors
    /// None for any secret.
    pub fn derive(secret: &[u8]) -> Result<Self, CertificateError> {
        let mut seed = Hmac::<Sha256>::new_from_slice(secret)
            .map_err(|error| CertificateError(error.to_string()))?;
        seed.update(b"stockade certificate");
        let mut key = PKCS8_HEAD.to_vec();
        key.extend_from_slice(&seed.finalize().into_bytes());
        let encoding = EncodingKey::from_ed_der(&key);
        let jwk = Jwk::from_encoding_key(&encoding, Algorithm::EdDSA)?;
        let AlgorithmParameters::OctetKeyPair(parameters) = jwk.algorithm else {
            return Err(CertificateError("not an Ed25519 key".to_owned()));
        };
        let public = parameters.x;
        let mut id = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(&public));
        id.truncate(16);
        Ok(Self {
            encoding,
            id,
            public,
        })
    }

    /// Its name: follows from the public key.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Signs.
    ///
    /// # Errors
    /// None for JSON.
    fn sign(&self, body: &Value) -> Result<String, CertificateError> {
        let header = Header {
            typ: Some(TYPE.to_owned()),
            kid: Some(self.id.clone()),
            ..Header::new(Algorithm::EdDSA)
        };
        Ok(encode(&header, body, &self.encoding)?)
    }
}

/// What a certificate says, if the owner of a public key (base64url) has signed it.
///
/// # Errors
/// [`CertificateError`].
pub fn verify(jws: &str, public_key: &str) -> Result<Value, CertificateError> {
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    let key = DecodingKey::from_ed_components(public_key)?;
    let token = decode::<Value>(jws, &key, &validation)?;
    if token.header.typ.as_deref() != Some(TYPE) {
        return Err(CertificateError("not a certificate".to_owned()));
    }
    Ok(token.claims)
}

/// The `kid` of a certificate: which key to verify it with.
///
/// # Errors
/// [`CertificateError`].
pub fn key_id(jws: &str) -> Result<String, CertificateError> {
    let header = jsonwebtoken::decode_header(jws)?;
    header
        .kid
        .ok_or_else(|| CertificateError("it names no key".to_owned()))
}

/// The certificate of a settled round that was seen to be sound; `None` when it was not seen so.
///
/// # Errors
/// None for JSON.
pub(super) fn issue(
    key: &CertificateKey,
    ending: &Ending,
    seen: &Seen,
) -> Result<Option<Certificate>, CertificateError> {
    let Some(orders_sha256) = &seen.orders else {
        return Ok(None);
    };
    let (sums, counters) = (&seen.sums, seen.sums.counters);
    let issued_at = clock::now();
    let instant = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Millis, true);
    let checks: serde_json::Map<_, _> = seen
        .report
        .checks
        .iter()
        .map(|check| (check.name.as_str().to_owned(), check.status.as_str().into()))
        .collect();
    let body = json!({
        "version": 1,
        "sale_id": ending.sale.0,
        "sale_number": ending.round.sale.0,
        "name": ending.name,
        "round": ending.round.round,
        "opens_at": instant(ending.opens_at),
        "closes_at": ending.closes_at.map(instant),
        "closed_at": instant(ending.closed_at),
        "allocation": counters.allocation,
        "remaining": counters.remaining,
        "held": counters.held,
        "sold": counters.sold,
        "seq": counters.seq,
        "epochs": seen.epochs,
        "orders": sums.orders,
        "confirmed": sums.confirmed_orders,
        "cancelled": sums.cancelled_orders,
        "orders_sha256": orders_sha256,
        "verdict": seen.report.verdict.as_str(),
        "checks": checks,
        "checked_at": instant(seen.report.checked_at),
        "issued_at": instant(issued_at),
    });
    Ok(Some(Certificate {
        closed_at: ending.closed_at,
        issued_at,
        key_id: key.id.clone(),
        public_key: key.public.clone(),
        jws: key.sign(&body)?,
        body,
    }))
}

/// The keys that certificates are verified with, as a JSON Web Key Set: the present one first.
///
/// # Errors
/// [`StoreError`].
pub async fn key_set(key: Option<&CertificateKey>, endings: &Endings) -> Result<Value, StoreError> {
    let mut keys: Vec<(String, String)> = key
        .map(|key| (key.id.clone(), key.public.clone()))
        .into_iter()
        .collect();
    for other in endings.keys().await? {
        if !keys.contains(&other) {
            keys.push(other);
        }
    }
    let keys: Vec<_> = keys
        .into_iter()
        .map(|(id, x)| {
            json!({ "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": id, "x": x })
        })
        .collect();
    Ok(json!({ "keys": keys }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_holds_for_its_key_and_its_bytes_alone() {
        let key = CertificateKey::derive(b"secret").unwrap();
        let other = CertificateKey::derive(b"other secret").unwrap();
        assert_eq!(
            (key.id(), &key.public),
            (
                CertificateKey::derive(b"secret").unwrap().id(),
                &CertificateKey::derive(b"secret").unwrap().public
            )
        );
        assert_ne!(key.id(), other.id());
        let body = json!({ "sold": 7 });
        let jws = key.sign(&body).unwrap();
        assert_eq!(key_id(&jws).unwrap(), key.id());
        assert_eq!(verify(&jws, &key.public).unwrap(), body);
        verify(&jws, &other.public).unwrap_err();
        let forged = BASE64_URL_SAFE_NO_PAD.encode(br#"{"sold":8}"#);
        let parts: Vec<_> = jws.split('.').collect();
        let forged = format!("{}.{forged}.{}", parts[0], parts[2]);
        verify(&forged, &key.public).unwrap_err();
        verify("", &key.public).unwrap_err();
        assert!(!format!("{key:?}").contains(&key.public));
    }
}
