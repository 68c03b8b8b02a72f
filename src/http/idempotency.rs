//! `Idempotency-Key`: what makes a retry safe.

use std::borrow::Cow;

use axum::{
    extract::FromRequestParts,
    http::{HeaderName, HeaderValue, request},
};

use super::problem::{Code, Problem};
use crate::domain::limits::IDEMPOTENCY_KEY_MAX;

/// The header that carries the key.
pub(super) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Says `true` on an answer that an earlier request got first.
pub(super) const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The value of [`IDEMPOTENCY_REPLAYED`].
pub(super) const REPLAYED: HeaderValue = HeaderValue::from_static("true");

const POINTER: &str = "#/headers/idempotency-key";

/// The key of a request that must have one: 1 to 255 visible ASCII characters.
///
/// As an extractor it refuses a request without; `Option<IdempotencyKey>` does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IdempotencyKey(pub(super) String);

impl IdempotencyKey {
    /// Reads the headers; `None` when there is no key, or an empty one.
    fn read(parts: &request::Parts) -> Result<Option<Self>, Problem> {
        let mut values = parts.headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(value) = values.next() else {
            return Ok(None);
        };
        if values.next().is_some() {
            return Err(Problem::unreadable(POINTER, "there is more than one"));
        }
        let key = parse(value.as_bytes())?;
        Ok((!key.is_empty()).then(|| Self(key.into_owned())))
    }
}

/// Bare, or a quoted string of RFC 9651: the same key either way.
fn parse(value: &[u8]) -> Result<Cow<'_, str>, Problem> {
    let refuse = || {
        let detail =
            format!("must be 1 to {IDEMPOTENCY_KEY_MAX} visible ASCII characters, bare or quoted");
        Problem::unreadable(POINTER, detail)
    };
    let text = str::from_utf8(value)
        .map_err(|_| refuse())?
        .trim_matches([' ', '\t']);
    let key = match text.strip_prefix('"') {
        Some(rest) => {
            let inner = rest.strip_suffix('"').ok_or_else(refuse)?;
            unquote(inner).ok_or_else(refuse)?
        }
        None => Cow::Borrowed(text),
    };
    if key.len() > IDEMPOTENCY_KEY_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(refuse());
    }
    Ok(key)
}

/// Takes the backslashes out of a quoted string; `None` when a quote or backslash lacks its own.
fn unquote(inner: &str) -> Option<Cow<'_, str>> {
    if !inner.contains(['"', '\\']) {
        return Some(Cow::Borrowed(inner));
    }
    let mut plain = String::with_capacity(inner.len());
    let mut characters = inner.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => return None,
            '\\' => plain.push(
                characters
                    .next()
                    .filter(|next| matches!(next, '"' | '\\'))?,
            ),
            other => plain.push(other),
        }
    }
    Some(Cow::Owned(plain))
}

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, Problem> {
        Self::read(parts)?.ok_or_else(|| {
            Problem::new(
                Code::IdempotencyKeyMissing,
                "This request needs an Idempotency-Key header.",
            )
        })
    }
}

impl<S: Sync> axum::extract::OptionalFromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut request::Parts,
        _state: &S,
    ) -> Result<Option<Self>, Problem> {
        Self::read(parts)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    async fn read(values: &[&[u8]]) -> Result<String, Code> {
        let mut request = Request::new(());
        for value in values {
            request
                .headers_mut()
                .append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(value).unwrap());
        }
        let (mut parts, ()) = request.into_parts();
        <IdempotencyKey as FromRequestParts<()>>::from_request_parts(&mut parts, &())
            .await
            .map(|key| key.0)
            .map_err(|problem| problem.code())
    }

    #[tokio::test]
    async fn bare_and_quoted_are_the_same_key() {
        let longest = "k".repeat(255);
        for (value, key) in [
            ("k-1", "k-1"),
            ("\"k-1\"", "k-1"),
            (" k-1 ", "k-1"),
            ("a\"b", "a\"b"),
            ("a\\b", "a\\b"),
            (r#""a\"b""#, "a\"b"),
            (r#""a\\b""#, "a\\b"),
            ("!~", "!~"),
            (&longest, &longest),
            (&format!("\"{longest}\""), &longest),
        ] {
            assert_eq!(
                read(&[value.as_bytes()]).await.as_deref(),
                Ok(key),
                "{value}"
            );
        }
    }

    #[tokio::test]
    async fn absent_and_empty_keys_are_missing() {
        for values in [&[] as &[&[u8]], &[b""], &[b"\"\""], &[b"  "]] {
            assert_eq!(
                read(values).await,
                Err(Code::IdempotencyKeyMissing),
                "{values:?}"
            );
        }
    }

    #[tokio::test]
    async fn what_is_no_key_is_refused() {
        let long = "k".repeat(300);
        for value in [
            long.as_bytes(),
            b"a b",
            b"a\tb",
            "ä".as_bytes(),
            b"\xff",
            b"\"",
            b"\"a",
            b"\"a\"b\"",
            br#""a\b""#,
            br#""a\""#,
            b"\"a b\"",
        ] {
            assert_eq!(read(&[value]).await, Err(Code::Validation), "{value:?}");
        }
        assert_eq!(read(&[b"a", b"a"]).await, Err(Code::Validation));
    }
}
