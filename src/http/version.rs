//! `ETag`, `If-Match` and `If-None-Match`: a version seen, and one that must not have moved.

use std::fmt::Write;

use axum::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    http::{
        HeaderMap, HeaderValue,
        header::{IF_MATCH, IF_NONE_MATCH},
        request,
    },
};

use sha2::{Digest, Sha256};

use super::problem::{Code, Problem};

/// What a [`live_etag`] has behind its version.
const LIVE: &str = "-live";

/// The `ETag` of a version.
pub(super) fn etag(version: i64) -> HeaderValue {
    // Quotes and digits are always a header's value.
    HeaderValue::from_str(&format!("\"{version}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// The `ETag` of a version that was shown together with what moves by itself. It names the same
/// version to a change, but is never what a client already has.
pub(super) fn live_etag(version: i64) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{version}{LIVE}\""))
        .unwrap_or(HeaderValue::from_static("\"\""))
}

/// The same with what moved, as it was shown: that a client may have already.
pub(super) fn seen_etag(version: i64, shown: &[u8]) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{version}{LIVE}-{}\"", digest(shown)))
        .unwrap_or(HeaderValue::from_static("\"\""))
}

/// The `ETag` of an answer that has no version, by its bytes.
pub(super) fn content_etag(shown: &[u8]) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{}\"", digest(shown)))
        .unwrap_or(HeaderValue::from_static("\"\""))
}

/// Sixteen hexadecimal digits that tell one text from another.
fn digest(shown: &[u8]) -> String {
    let hash = Sha256::digest(shown);
    hash[..8].iter().fold(String::new(), |mut text, byte| {
        // Writing into a string cannot fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}

/// The version that an `ETag` of ours names, without its quotes.
fn version(tag: &str) -> Option<i64> {
    let (version, shown) = match tag.split_once(LIVE) {
        Some((version, shown)) => (version, shown),
        None => (tag, ""),
    };
    let digits = |text: &str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let known = shown.is_empty() || shown.strip_prefix('-').is_some_and(digits);
    let number = version.parse::<i64>().ok()?;
    // Only the one way of writing it is a version: `+1` and `01` are none.
    (known && number.to_string() == version).then_some(number)
}

/// Whether the client already has what this `ETag` names.
pub(super) fn unchanged(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| {
            value.split(',').map(str::trim).any(|tag| {
                tag == "*" || tag.strip_prefix("W/").unwrap_or(tag).as_bytes() == etag.as_bytes()
            })
        })
}

/// The version that the client saw before its change. `*` is no version: it would overwrite
/// what nobody has looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct IfMatch(pub(super) i64);

/// The refusal of a version that is not the present one.
pub(super) fn stale() -> Problem {
    Problem::new(
        Code::PreconditionFailed,
        "If-Match does not name the present version.",
    )
}

impl<S: Sync> OptionalFromRequestParts<S> for IfMatch {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut request::Parts,
        state: &S,
    ) -> Result<Option<Self>, Problem> {
        if !parts.headers.contains_key(IF_MATCH) {
            return Ok(None);
        }
        <Self as FromRequestParts<S>>::from_request_parts(parts, state)
            .await
            .map(Some)
    }
}

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get(IF_MATCH) else {
            let detail = "Send the ETag of the version that you change as If-Match.";
            return Err(Problem::new(Code::PreconditionRequired, detail));
        };
        let version = value
            .to_str()
            .ok()
            .map(str::trim)
            .and_then(|tag| version(tag.strip_prefix('"')?.strip_suffix('"')?));
        version.map(Self).ok_or_else(stale)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    #[tokio::test]
    async fn a_change_names_exactly_one_version() {
        for (value, expected) in [
            (None, Err(Code::PreconditionRequired)),
            (Some("\"3\""), Ok(3)),
            (Some("3"), Err(Code::PreconditionFailed)),
            (Some("\"3-live\""), Ok(3)),
            (Some("\"3-live-0123456789abcdef\""), Ok(3)),
            (Some("\"3-live-0123\""), Err(Code::PreconditionFailed)),
            (
                Some("\"3-live0123456789abcdef\""),
                Err(Code::PreconditionFailed),
            ),
            (Some("\"3-dead\""), Err(Code::PreconditionFailed)),
            (Some("\"03-live\""), Err(Code::PreconditionFailed)),
            (Some("\"03\""), Err(Code::PreconditionFailed)),
            (Some("\"+3\""), Err(Code::PreconditionFailed)),
            (Some("W/\"3\""), Err(Code::PreconditionFailed)),
            (Some("*"), Err(Code::PreconditionFailed)),
            (Some("\"abc\""), Err(Code::PreconditionFailed)),
        ] {
            let mut request = Request::new(());
            if let Some(value) = value {
                request
                    .headers_mut()
                    .insert(IF_MATCH, HeaderValue::from_static(value));
            }
            let (mut parts, ()) = request.into_parts();
            let read = <IfMatch as FromRequestParts<()>>::from_request_parts(&mut parts, &()).await;
            assert_eq!(
                read.map(|read| read.0).map_err(|problem| problem.code()),
                expected,
                "{value:?}"
            );
        }
    }

    #[test]
    fn a_version_that_the_client_has_is_not_sent_again() {
        for (value, expected) in [
            ("\"3\"", true),
            ("W/\"3\"", true),
            ("\"1\", \"3\"", true),
            ("*", true),
            ("\"4\"", false),
            ("\"3-live\"", false),
            ("3", false),
            ("\"33\"", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_static(value));
            assert_eq!(unchanged(&headers, &etag(3)), expected, "{value}");
        }
        assert!(!unchanged(&HeaderMap::new(), &etag(3)));
    }
}
