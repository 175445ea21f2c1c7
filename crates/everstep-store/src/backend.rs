//! From a URL to an object store.
//!
//! object_store's S3 client is built here without its default TLS: the HTTP client (reqwest with
//! `rustls-no-provider`) takes the process's default rustls provider, and requests are signed by object_store's `ring`
//! feature. So ring is installed as rustls's provider before the first client is built, unless the program has chosen one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::ClientConfigKey;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use url::Url;

use crate::error::{StoreError, one_line};

/// Longest time of a request that moves blocks: 40 MiB on their way at 10 Mbit/s.
const BULK_TIMEOUT: &str = "45 seconds";
/// Longest time of any other request.
const SMALL_TIMEOUT: &str = "5 seconds";

/// One store, seen from inside one run's folder.
#[derive(Clone)]
pub(crate) struct Backend {
    /// For blocks: a request may move megabytes over a slow link.
    pub(crate) bulk: Arc<dyn ObjectStore>,
    /// For documents, sizes and lists: what takes longer than seconds will not come.
    pub(crate) small: Arc<dyn ObjectStore>,
    /// The run's folder, for `file://` only.
    pub(crate) folder: Option<PathBuf>,
    /// What is probably the cause if the store refuses us.
    pub(crate) suspicion: Option<&'static str>,
}

/// Opens `url` for `run`; `options` are AWS settings (`AWS_ENDPOINT_URL`, …) that override the environment.
pub(crate) fn open(
    url: &str,
    run: &str,
    options: &BTreeMap<String, String>,
) -> Result<Backend, StoreError> {
    let bad = |reason: String| StoreError::BadUrl {
        url: url.to_owned(),
        reason,
    };
    let parsed = Url::parse(url).map_err(|error| {
        bad(format!(
            "{error}; allowed are `file:///folder` and `s3://bucket/prefix`"
        ))
    })?;
    if parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(bad(
            "`?` and `#` are not allowed, settings come from the AWS_* environment".to_owned(),
        ));
    }
    match parsed.scheme() {
        "file" => open_file(url, &parsed, run),
        "s3" => open_s3(url, &parsed, run, options),
        scheme => Err(StoreError::UnknownScheme {
            url: url.to_owned(),
            scheme: scheme.to_owned(),
        }),
    }
}

fn open_file(url: &str, parsed: &Url, run: &str) -> Result<Backend, StoreError> {
    let root = parsed.to_file_path().map_err(|()| StoreError::BadUrl {
        url: url.to_owned(),
        reason: "a folder is written `file:///absolute/path`, with three slashes".to_owned(),
    })?;
    let refused = |reason: String| StoreError::NotWritable {
        url: url.to_owned(),
        reason,
    };
    let folder = root.join(run);
    // A commit must outlive a power cut, so files and folders are synced before a write counts.
    let store: Arc<dyn ObjectStore> = match std::fs::create_dir_all(&folder) {
        Ok(()) => {
            let local = LocalFileSystem::new_with_prefix(&folder)
                .map_err(|error| refused(one_line(&error)))?;
            Arc::new(local.with_fsync(true))
        }
        // The disk may be away for a while (a mount, a full disk). A process that starts meanwhile goes on when it is back.
        Err(error) => {
            let prefix = Path::from_absolute_path(&folder)
                .map_err(|_| refused(format!("cannot create `{}`: {error}", folder.display())))?;
            Arc::new(PrefixStore::new(
                LocalFileSystem::new().with_fsync(true),
                prefix,
            ))
        }
    };
    Ok(Backend {
        bulk: Arc::clone(&store),
        small: store,
        folder: Some(folder),
        suspicion: None,
    })
}

fn open_s3(
    url: &str,
    parsed: &Url,
    run: &str,
    options: &BTreeMap<String, String>,
) -> Result<Backend, StoreError> {
    let bad = |reason: String| StoreError::BadUrl {
        url: url.to_owned(),
        reason,
    };
    let bucket = parsed.host_str().filter(|bucket| !bucket.is_empty());
    let bucket = bucket
        .ok_or_else(|| bad("the bucket is missing, write `s3://bucket/prefix`".to_owned()))?;
    if !parsed.username().is_empty() || parsed.password().is_some() || parsed.port().is_some() {
        return Err(bad(
            "credentials and ports do not belong here, use AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
                .to_owned(),
        ));
    }
    let prefix = Path::from_url_path(parsed.path())
        .map_err(|error| bad(error.to_string()))?
        .join(run);

    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    for (name, value) in options {
        let key: AmazonS3ConfigKey = name.to_ascii_lowercase().parse().map_err(|_| {
            bad(format!(
                "setting `{name}` is unknown, allowed are the AWS_* names of object_store"
            ))
        })?;
        builder = builder.with_config(key, value);
    }
    let allow_http = AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp);
    let plain_http = endpoint(&builder).is_some_and(|endpoint| endpoint.starts_with("http://"));
    if plain_http && builder.get_config_value(&allow_http).as_deref() != Some("true") {
        return Err(bad(
            "AWS_ENDPOINT_URL is plain http://, which needs AWS_ALLOW_HTTP=true".to_owned(),
        ));
    }
    let suspicion = (!has_credentials(&builder)).then_some(
        "neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY nor another source of credentials is set",
    );
    // An error only says that the program has chosen a provider already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let build = |timeout: &str| -> Result<Arc<dyn ObjectStore>, StoreError> {
        let client = |key: ClientConfigKey| AmazonS3ConfigKey::Client(key);
        let builder = builder
            .clone()
            .with_retry(retries())
            .with_config(client(ClientConfigKey::ConnectTimeout), "3 seconds")
            .with_config(client(ClientConfigKey::Timeout), timeout);
        let store = build_s3(builder, plain_http).map_err(|error| bad(one_line(&error)))?;
        Ok(Arc::new(PrefixStore::new(store, prefix.clone())))
    };
    Ok(Backend {
        bulk: build(BULK_TIMEOUT)?,
        small: build(SMALL_TIMEOUT)?,
        folder: None,
        suspicion,
    })
}

/// Whether anything but the metadata service of a cloud machine could give credentials.
fn has_credentials(builder: &AmazonS3Builder) -> bool {
    [
        AmazonS3ConfigKey::AccessKeyId,
        AmazonS3ConfigKey::WebIdentityTokenFile,
        AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
        AmazonS3ConfigKey::ContainerCredentialsFullUri,
    ]
    .iter()
    .any(|key| builder.get_config_value(key).is_some())
        || builder
            .get_config_value(&AmazonS3ConfigKey::SkipSignature)
            .as_deref()
            == Some("true")
}

fn endpoint(builder: &AmazonS3Builder) -> Option<String> {
    let value = |key| builder.get_config_value(&key);
    value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint))
}

/// Bare containers have no CA certificates, without which the HTTP client cannot be built. A plain `http://` endpoint
/// needs none, so there the client is built with an empty set, which trusts nobody.
fn build_s3(builder: AmazonS3Builder, plain_http: bool) -> object_store::Result<AmazonS3> {
    let result = builder.clone().build();
    if result.is_err() && plain_http {
        let no_certificates = AmazonS3ConfigKey::Client(ClientConfigKey::NoSystemCertificates);
        return builder.with_config(no_certificates, "true").build();
    }
    result
}

/// A request that failed is repeated a few times at once, with jitter. An outage is the caller's to bridge: it knows what else
/// can be done meanwhile, and says so.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: 4,
        retry_timeout: Duration::from_secs(6),
    }
}
