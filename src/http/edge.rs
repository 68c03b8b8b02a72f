//! What every request passes through, in one layer: the request's id, the time limit, panics,
//! problem documents, the headers that browsers want, metrics and the access log.
//!
//! One layer rather than six: each would box a future and touch the request again, on the path
//! that everything else waits for.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Once},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, HttpBody},
    extract::{ConnectInfo, MatchedPath, Request},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERER,
            REFERRER_POLICY, STRICT_TRANSPORT_SECURITY, USER_AGENT, X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use tower::{Layer, Service};

use super::{
    HttpSettings,
    access_log::Line,
    body::{self, BODY_BYTES_MAX, IMAGE_BYTES_MAX},
    client, images,
    limit::{Asker, Charge},
    problem::{self, CALL_MAY_RUN_FOR, Code, MEDIA_TYPE, Problem},
    routes::{Name, Names},
    trail::Witness,
};
use crate::{
    clock,
    metrics::{HttpMetrics, RefusalLabels, RequestLabels, RouteLabels},
    ops::audit_log::AuditTrail,
};

/// The header that carries the request's id, in and out.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that is taken over from a client, in characters.
const REQUEST_ID_MAX: usize = 128;

/// How long browsers remember that this server speaks TLS.
const A_YEAR: &str = "max-age=31536000";

/// What a route that is not in the table is called.
const UNMATCHED: &str = "unmatched";

/// How the edge behaves, and where it reports to.
pub(super) struct Edge {
    settings: HttpSettings,
    metrics: HttpMetrics,
    audit_trail: AuditTrail,
    /// What each route's template is called elsewhere; the aliases share the name.
    routes: Names,
    unmatched: Name,
    /// Whether it was said that a proxy is not configured.
    warned: Once,
}

impl Edge {
    pub(super) fn new(
        settings: HttpSettings,
        metrics: HttpMetrics,
        audit_trail: AuditTrail,
        routes: Names,
    ) -> Self {
        Self {
            settings,
            metrics,
            audit_trail,
            routes,
            unmatched: Name {
                route: UNMATCHED.into(),
                noted: [].into(),
                reading: Some(Charge::UNMATCHED),
                changing: Some(Charge::UNMATCHED),
            },
            warned: Once::new(),
        }
    }

    /// The client's address; `None` in tests without a socket.
    fn client(&self, request: &Request) -> Option<IpAddr> {
        let peer = request.extensions().get::<ConnectInfo<SocketAddr>>()?;
        let (peer, headers) = (peer.0.ip(), request.headers());
        let trusted = &self.settings.trusted_proxies;
        if !self.warned.is_completed() && client::looks_like_a_proxy(peer, headers, trusted) {
            self.warned.call_once(|| {
                tracing::warn!(
                    %peer,
                    "a proxy speaks for others and is not in STOCKADE_TRUSTED_PROXIES: limits per \
                     address take all that it speaks for as one client"
                );
            });
        }
        Some(client::address(peer, headers, trusted))
    }

    fn name(&self, request: &Request) -> &Name {
        let matched = request.extensions().get::<MatchedPath>();
        let name = matched.and_then(|matched| self.routes.get(matched.as_str()));
        name.unwrap_or(&self.unmatched)
    }
}

/// Puts the edge around a router.
#[derive(Clone)]
pub(super) struct EdgeLayer(pub(super) Arc<Edge>);

impl<S> Layer<S> for EdgeLayer {
    type Service = EdgeService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        EdgeService {
            edge: Arc::clone(&self.0),
            inner,
        }
    }
}

/// A route with the edge around it.
#[derive(Clone)]
pub(super) struct EdgeService<S> {
    edge: Arc<Edge>,
    inner: S,
}

impl<S> Service<Request> for EdgeService<S>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let started = Instant::now();
        let edge = Arc::clone(&self.edge);
        // The clone stays behind, unused; the service that was polled ready is called.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let name = edge.name(&request);
        let route = Arc::clone(&name.route);
        let method = request.method().clone();
        let id = request_id(request.headers());
        let client = edge.client(&request);
        let witness = Witness::of(&edge.audit_trail, name, &request, &id, client);
        let log = &edge.settings.access_log;
        let line = log.is_on().then(|| line(&request, client));
        let asker = Asker {
            throttle: edge.settings.throttle.clone(),
            address: client,
            charge: name.charge(&method),
        };
        let paid = asker.pay();
        request.extensions_mut().insert(asker);

        Box::pin(async move {
            let answer = async {
                if let Err(problem) = paid {
                    return problem.into_response();
                }
                let most = body_bytes_max(&route);
                if declared_length(request.headers()) > most {
                    return body::too_large(most).into_response();
                }
                let answer = inner.call(request);
                let answer = match &witness {
                    Some(witness) => witness.watch(answer).await,
                    None => answer.await,
                };
                match answer {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            };
            let timeout = edge.settings.request_timeout;
            let answer = tokio::time::timeout(timeout, AssertUnwindSafe(answer).catch_unwind());
            let mut response = match answer.await {
                Ok(Ok(response)) => response,
                Ok(Err(panic)) => {
                    edge.metrics.panics.inc();
                    let message = panic_message(&*panic);
                    Problem::internal(format_args!("panic: {message}")).into_response()
                }
                Err(_) => timed_out(timeout).into_response(),
            };

            let problem = finish(&mut response, &method, &id, &route, &edge.metrics);
            if edge.settings.tls {
                let headers = response.headers_mut();
                headers.insert(STRICT_TRANSPORT_SECURITY, HeaderValue::from_static(A_YEAR));
            }
            if let Some(witness) = witness {
                witness.saw(problem.map(|code| code.meaning().word));
            }
            let elapsed = started.elapsed();
            let labels = RouteLabels {
                route: Arc::clone(&route),
                method: method_name(&method),
            };
            edge.metrics
                .duration
                .get_or_create(&labels)
                .observe(elapsed.as_secs_f64());
            let RouteLabels { route, method } = labels;
            let labels = RequestLabels {
                route,
                method,
                status: response.status().as_u16(),
            };
            edge.metrics.requests.get_or_create(&labels).inc();
            if let Some(line) = line {
                let bytes = response.body().size_hint().exact();
                edge.settings.access_log.write(Line {
                    status: response.status(),
                    bytes,
                    elapsed,
                    request_id: id,
                    ..line
                });
            }
            Ok(response)
        })
    }
}

/// Makes an answer whole: the problem's document, then the headers that every answer has. Gives the
/// problem's code.
fn finish(
    response: &mut Response,
    method: &Method,
    id: &HeaderValue,
    route: &str,
    metrics: &HttpMetrics,
) -> Option<Code> {
    if *method == Method::OPTIONS && response.status() == StatusCode::METHOD_NOT_ALLOWED {
        // The router has put the methods into `Allow` already, which is the question.
        *response.status_mut() = StatusCode::NO_CONTENT;
        *response.body_mut() = Body::empty();
    }
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| {
        let refused = response.status().is_client_error() || response.status().is_server_error();
        let kind = response.headers().get(CONTENT_TYPE);
        (refused && kind.is_none_or(|kind| kind != MEDIA_TYPE))
            .then(|| problem::bare(response.status()))
    });
    let code = problem.as_ref().map(Problem::code);
    if let Some(mut problem) = problem {
        if method.is_safe() {
            problem = problem.of_reading();
        }
        let request_id = id.to_str().unwrap_or_default();
        report(&problem, request_id, route);
        metrics
            .refusals
            .get_or_create(&RefusalLabels {
                code: problem.code().meaning().word,
            })
            .inc();
        problem.render(request_id, response);
        if *method == Method::HEAD {
            // The router takes the body off its routes' answers, but not off its fallback's.
            *response.body_mut() = Body::empty();
        }
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id.clone());
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers
        .entry(CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static(
            "default-src 'none'; frame-ancestors 'none'",
        ));
    headers
        .entry(CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    code
}

/// Refusals of business are counted, not logged; what is our fault or a store's is logged.
fn report(problem: &Problem, request_id: &str, route: &str) {
    let Some(cause) = problem.cause() else { return };
    if problem.code() == Code::Internal {
        tracing::error!(
            request_id,
            route,
            cause,
            "a request failed inside the server"
        );
    } else {
        tracing::warn!(request_id, route, cause, "a request could not be served");
    }
}

/// The client's id if it is a modest one, otherwise a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|value| {
        let bytes = value.as_bytes();
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_MAX && bytes.iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        let mut text = [0; 36];
        let id = clock::new_id();
        // Hexadecimal digits and hyphens are always a header's value.
        HeaderValue::from_str(id.hyphenated().encode_lower(&mut text))
            .unwrap_or(HeaderValue::from_static("none"))
    })
}

/// How large a body a route takes, in bytes.
fn body_bytes_max(route: &str) -> usize {
    if route == images::UPLOAD {
        IMAGE_BYTES_MAX
    } else {
        BODY_BYTES_MAX
    }
}

fn declared_length(headers: &HeaderMap) -> usize {
    let declared = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    declared.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn timed_out(timeout: Duration) -> Problem {
    tracing::debug!(timeout_ms = timeout.as_millis(), "no answer in time");
    Problem::unknown("The answer took too long.", CALL_MAY_RUN_FOR)
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    if let Some(message) = panic.downcast_ref::<&'static str>() {
        message
    } else if let Some(message) = panic.downcast_ref::<String>() {
        message
    } else {
        "without a message"
    }
}

/// The method as a label: a client can make up any number of others.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}

/// What the access log wants to know before the request is gone.
fn line(request: &Request, client: Option<IpAddr>) -> Line {
    let text = |name| {
        request
            .headers()
            .get(name)
            .map(|value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    // Without queries, here and where the client came from: a token may have strayed there.
    let target = request.uri().path().to_owned();
    let referer = text(REFERER).map(|mut referer| {
        referer.truncate(referer.find(['?', '#']).unwrap_or(referer.len()));
        referer
    });
    Line {
        at: clock::now(),
        client,
        method: request.method().clone(),
        target,
        version: request.version(),
        status: StatusCode::OK,
        bytes: None,
        elapsed: Duration::ZERO,
        request_id: HeaderValue::from_static(""),
        referer,
        user_agent: text(USER_AGENT),
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        http::header::{ALLOW, RETRY_AFTER},
        routing::{any, get, post},
    };

    use super::{
        super::tests::{Answer, edged, edged_within},
        *,
    };

    fn app() -> Router {
        edged(
            Router::new()
                .route("/hello", get(async || "hello"))
                .route("/panic", get(async || -> String { panic!("key {{p0}}") }))
                .route("/bare", get(async || StatusCode::IM_A_TEAPOT))
                .route(
                    "/slow",
                    get(std::future::pending::<()>).merge(post(std::future::pending::<()>)),
                ),
        )
    }

    #[tokio::test]
    async fn every_answer_has_an_id_and_every_problem_names_it() {
        for (uri, status) in [
            ("/hello", 200),
            ("/panic", 500),
            ("/bare", 418),
            ("/nowhere", 404),
        ] {
            let answer = Answer::get(app(), Method::GET, uri).await;
            let id = answer.headers[REQUEST_ID].to_str().unwrap().to_owned();
            assert!(uuid::Uuid::parse_str(&id).is_ok(), "{uri}");
            if status != 200 {
                assert_eq!(answer.body["instance"], id, "{uri}");
                assert!(!answer.text.contains("p0"), "{uri}");
            }
        }
        let long = "x".repeat(129);
        for (given, kept) in [
            ("my-id/7", true),
            (&long[1..], true),
            (&long, false),
            ("a b", false),
            ("", false),
        ] {
            let request = Request::get("/nowhere").header(REQUEST_ID, given);
            let answer = Answer::of(app(), request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.headers[REQUEST_ID] == given, kept, "{given}");
            assert_eq!(
                answer.body["instance"],
                answer.headers[REQUEST_ID].to_str().unwrap()
            );
        }
    }

    #[tokio::test]
    async fn refusals_of_the_router_are_problems_too() {
        Answer::get(app(), Method::GET, "/nowhere")
            .await
            .is_problem(StatusCode::NOT_FOUND, Code::NotFound);
        let answer = Answer::get(app(), Method::DELETE, "/hello").await;
        answer.is_problem(StatusCode::METHOD_NOT_ALLOWED, Code::MethodNotAllowed);
        assert_eq!(answer.headers[ALLOW], "GET,HEAD");
        Answer::get(app(), Method::GET, "/panic")
            .await
            .is_problem(StatusCode::INTERNAL_SERVER_ERROR, Code::Internal);
    }

    #[tokio::test]
    async fn head_and_options_answer_without_a_body() {
        let answer = Answer::get(app(), Method::HEAD, "/hello").await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, ""));
        assert_eq!(answer.headers[CONTENT_LENGTH], "5");
        let answer = Answer::get(app(), Method::HEAD, "/nowhere").await;
        assert_eq!(
            (answer.status, answer.text.as_str()),
            (StatusCode::NOT_FOUND, "")
        );
        let answer = Answer::get(app(), Method::OPTIONS, "/slow").await;
        assert_eq!(
            (answer.status, answer.text.as_str()),
            (StatusCode::NO_CONTENT, "")
        );
        assert_eq!(answer.headers[ALLOW], "GET,HEAD,POST");
    }

    #[tokio::test]
    async fn a_handler_that_takes_too_long_is_unavailable_and_unknown_if_it_writes() {
        let slow = Router::new().route("/slow", any(std::future::pending::<()>));
        let app = edged_within(slow, Duration::from_millis(20));
        for (method, outcome, wait) in [
            (Method::GET, "not_applied", "3"),
            (Method::POST, "unknown", "3"),
        ] {
            let answer = Answer::get(app.clone(), method, "/slow").await;
            answer.is_problem(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable);
            assert_eq!(answer.body["outcome"], outcome);
            assert_eq!(answer.headers[RETRY_AFTER], wait);
        }
    }

    #[tokio::test]
    async fn a_large_body_is_refused_even_where_none_is_read() {
        let request = Request::get("/hello").header(CONTENT_LENGTH, BODY_BYTES_MAX + 1);
        let answer = Answer::of(app(), request.body(Body::empty()).unwrap()).await;
        answer.is_problem(StatusCode::PAYLOAD_TOO_LARGE, Code::PayloadTooLarge);
    }

    #[tokio::test]
    async fn browsers_are_told_what_not_to_do() {
        let answer = Answer::get(app(), Method::GET, "/hello").await;
        for (name, value) in [
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            (
                CONTENT_SECURITY_POLICY,
                "default-src 'none'; frame-ancestors 'none'",
            ),
            (CACHE_CONTROL, "no-store"),
        ] {
            assert_eq!(answer.headers[name], value);
        }
    }
}
