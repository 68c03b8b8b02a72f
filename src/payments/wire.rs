//! HTTP to a gateway: one client, bounded in time and size, and the meaning of what goes wrong.

use std::time::Duration;

use reqwest::{Client, RequestBuilder, StatusCode, header::RETRY_AFTER, redirect::Policy};
use serde_json::Value;

use super::{ANSWER_BYTES_MAX, CALL_MAX, CONNECT_MAX, Trouble};

/// How long to wait after a 429 that does not say.
const LATER: Duration = Duration::from_secs(2);
/// The longest wait that a gateway may ask for.
const LATER_MAX: Duration = Duration::from_mins(1);

/// What a gateway said.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Value,
}

/// A client for one gateway.
pub(super) fn client() -> Result<Client, reqwest::Error> {
    Client::builder()
        .connect_timeout(CONNECT_MAX)
        .timeout(CALL_MAX)
        // Money goes where it is sent, not where an answer points.
        .redirect(Policy::none())
        .user_agent(concat!("stockade/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Sends a request. An answer that says that the gateway is in trouble is none.
pub(super) async fn send(request: RequestBuilder) -> Result<Reply, Trouble> {
    let mut response = request.send().await.map_err(trouble)?;
    let status = response.status();
    let after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map_or(LATER, Duration::from_secs)
        .min(LATER_MAX);
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(trouble)? {
        if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(Trouble::Unknown("the answer does not end".to_owned()));
        }
        bytes.extend_from_slice(&chunk);
    }
    match status {
        StatusCode::TOO_MANY_REQUESTS => Err(Trouble::Unavailable {
            reason: "too many requests".to_owned(),
            after,
        }),
        // Another request with the same key is under way.
        StatusCode::CONFLICT => Err(Trouble::Unknown("it is busy with the same".to_owned())),
        status if status.is_server_error() => Err(Trouble::Unknown(format!("status {status}"))),
        StatusCode::NO_CONTENT => Ok(Reply {
            status,
            body: Value::Null,
        }),
        status => match serde_json::from_slice(&bytes) {
            Ok(body) => Ok(Reply { status, body }),
            Err(error) => Err(Trouble::Unknown(format!(
                "status {status}, no JSON: {error}"
            ))),
        },
    }
}

/// A key that is not taken is no answer about the payment: nothing happened, and the operator has
/// something to mend.
pub(super) fn not_let_in(reply: &Reply) -> Option<Trouble> {
    matches!(
        reply.status,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
    )
    .then(|| {
        tracing::error!(status = %reply.status, "a gateway does not take the configured key");
        Trouble::Unavailable {
            reason: "it does not take our key".to_owned(),
            after: LATER,
        }
    })
}

/// Only a connection that was never there proves that nothing was sent.
fn trouble(error: reqwest::Error) -> Trouble {
    // The address is the operator's, and has no place in what buyers may see.
    let error = error.without_url();
    if error.is_builder() || error.is_connect() {
        Trouble::Unavailable {
            reason: "it cannot be reached".to_owned(),
            after: LATER,
        }
    } else {
        Trouble::Unknown(error.to_string())
    }
}

/// A text below `path` in an answer.
pub(super) fn text<'a>(body: &'a Value, path: &str) -> Option<&'a str> {
    body.pointer(path)?.as_str()
}

/// A text that must be there.
pub(super) fn must<'a>(body: &'a Value, path: &str) -> Result<&'a str, Trouble> {
    text(body, path).ok_or_else(|| Trouble::Unknown(format!("the answer has no {path}")))
}

/// A part of an address: what comes from a gateway goes into a path only if it cannot change it.
pub(super) fn segment(reference: &str) -> Result<&str, Trouble> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if !reference.is_empty() && reference.len() <= 255 && reference.bytes().all(plain) {
        Ok(reference)
    } else {
        Err(Trouble::Disagrees("a name that is none".to_owned()))
    }
}
