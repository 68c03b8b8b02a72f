//! `ETag`, `If-Match` and `If-None-Match`: a version seen, and one that must not have moved.

use axum::{
    extract::FromRequestParts,
    http::{
        HeaderMap, HeaderValue,
        header::{IF_MATCH, IF_NONE_MATCH},
        request,
    },
};

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

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get(IF_MATCH) else {
            let detail = "Send the ETag of the version that you change as If-Match.";
            return Err(Problem::new(Code::PreconditionRequired, detail));
        };
        let version = value.to_str().ok().map(str::trim).and_then(|tag| {
            let tag = tag.strip_prefix('"')?.strip_suffix('"')?;
            tag.strip_suffix(LIVE).unwrap_or(tag).parse::<i64>().ok()
        });
        version
            .filter(|version| etag(*version) == value || live_etag(*version) == value)
            .map(Self)
            .ok_or_else(stale)
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
            let read = IfMatch::from_request_parts(&mut parts, &()).await;
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
