//! What people read: the OpenAPI document, the interactive pages, a page per problem code.
//! Everything comes out of the binary, nothing from elsewhere.

use std::fmt::Write;

use axum::{
    Router,
    http::{
        HeaderValue,
        header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE},
    },
    middleware,
    response::{Html, IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use utoipa::{
    OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::{
    body::Path,
    problem::{self, Code, Outcome, Problem, Retry},
    routes::{API_KEY, SECURITY},
};

/// The interactive pages run scripts and styles of their own, and call this server.
const PAGES_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

/// The problem pages have a style sheet and nothing else.
const PROBLEMS_POLICY: &str = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = "\
:root { color-scheme: light dark; font: 1rem/1.6 system-ui, sans-serif; }
body { max-width: 44rem; margin: 3rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid #8886; border-radius: .4rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.5rem .2rem 0; }
";

/// The document before the routes are in it.
pub(super) fn openapi() -> utoipa::openapi::OpenApi {
    #[derive(OpenApi)]
    #[openapi(
        info(
            title = "Stockade",
            description = "Sells exactly the stock, to the right people, fast, and keeps what it accepted. \
                           Every path under /v1 is also served under /api. \
                           Every refusal is an RFC 9457 problem document.",
        ),
        components(schemas(problem::Document))
    )]
    struct Document;

    let mut document = Document::openapi();
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("JWT")
        .description(Some(
            "An access token, from login or from whoever shares the secret.",
        ))
        .build();
    let key = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("sk_stockade_…")
        .description(Some(
            "An API key: `read` for GET, `buy` for what changes, `operate` for operators.",
        ))
        .build();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(SECURITY, SecurityScheme::Http(scheme));
    components.add_security_scheme(API_KEY, SecurityScheme::Http(key));
    document
}

/// The pages about `document` and about every problem.
pub(super) fn router(document: &utoipa::openapi::OpenApi) -> Router {
    // The document is made of maps with string keys, so it always becomes JSON.
    let json = Bytes::from(serde_json::to_vec(document).unwrap_or_default());
    let config = Config::new(["/openapi.json"])
        .validator_url("none")
        .use_base_layout();
    let pages: Router = SwaggerUi::new("/docs").config(config).into();
    let problems = Router::new()
        .route("/docs/problems", get(index))
        .route("/docs/problems/{code}", get(page))
        .route(
            "/docs/problems.css",
            get(async || ([(CONTENT_TYPE, "text/css; charset=utf-8")], STYLE)),
        );
    Router::new()
        .route(
            "/openapi.json",
            get(async move || ([(CONTENT_TYPE, "application/json")], json.clone())),
        )
        .merge(
            pages.layer(middleware::map_response(async |response: Response| {
                policy(response, PAGES_POLICY)
            })),
        )
        .merge(
            problems.layer(middleware::map_response(async |response: Response| {
                policy(response, PROBLEMS_POLICY)
            })),
        )
}

fn policy(mut response: Response, policy: &'static str) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(
        CACHE_CONTROL,
        HeaderValue::from_static("public, max-age=300"),
    );
    response
}

async fn index() -> Html<String> {
    // Writing into a string cannot fail.
    let mut rows = String::new();
    for code in Code::ALL {
        let meaning = code.meaning();
        let _ = writeln!(
            rows,
            "<tr><td><a href=\"/docs/problems/{word}\"><code>{word}</code></a></td><td>{status}</td><td>{title}</td></tr>",
            word = meaning.word,
            status = statuses(*code),
            title = escaped(meaning.title),
        );
    }
    Html(whole(
        "Problems",
        &format!(
            "<h1>Problems</h1>\n<p>Every refusal is an <code>application/problem+json</code> document (RFC 9457). \
         Its <code>code</code> is one of these.</p>\n\
         <table><tr><th>code</th><th>status</th><th>title</th></tr>\n{rows}</table>"
        ),
    ))
}

async fn page(Path(word): Path<String>) -> Result<Response, Problem> {
    let code = Code::parse(&word).ok_or_else(Problem::not_found)?;
    let meaning = code.meaning();
    let retry = match meaning.retry {
        Retry::Never => "<code>never</code>: the same request cannot succeed.",
        Retry::SameKey => {
            "<code>same_key</code>: repeat it with the same key. <code>never</code> if the store has looked the key up."
        }
        Retry::After => {
            "<code>after</code>: repeat it with the same key, not before <code>Retry-After</code>."
        }
    };
    let outcome = match meaning.outcome {
        Outcome::NotApplied => {
            "<code>not_applied</code>, unless the document says <code>unknown</code>."
        }
        Outcome::Unknown => {
            "<code>unknown</code>: it may have been carried out. A retry with the same key tells."
        }
    };
    let body = format!(
        "<p><a href=\"/docs/problems\">Problems</a></p>\n<h1>{title}</h1>\n\
         <table><tr><th>code</th><td><code>{word}</code></td></tr>\n\
         <tr><th>status</th><td>{status}</td></tr>\n<tr><th>retry</th><td>{retry}</td></tr>\n\
         <tr><th>outcome</th><td>{outcome}</td></tr></table>\n\
         <h2>Cause</h2>\n<p>{cause}</p>\n<h2>Fix</h2>\n<p>{fix}</p>\n\
         <h2>Try</h2>\n<pre><code>{curl}</code></pre>",
        title = escaped(meaning.title),
        word = meaning.word,
        status = statuses(code),
        cause = marked_up(meaning.cause),
        fix = marked_up(meaning.fix),
        curl = escaped(meaning.curl),
    );
    Ok(Html(whole(meaning.title, &body)).into_response())
}

fn statuses(code: Code) -> String {
    let status = code.meaning().status.as_u16();
    if code == Code::Validation {
        format!("{status} or 422")
    } else {
        status.to_string()
    }
}

fn whole(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{} · Stockade</title>\n\
         <link rel=\"stylesheet\" href=\"/docs/problems.css\">\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
        escaped(title)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Escaped, with what stands between backticks as code.
fn marked_up(text: &str) -> String {
    let mut html = String::new();
    for (index, piece) in escaped(text).split('`').enumerate() {
        if index % 2 == 0 {
            html += piece;
        } else {
            html.extend(["<code>", piece, "</code>"]);
        }
    }
    html
}
