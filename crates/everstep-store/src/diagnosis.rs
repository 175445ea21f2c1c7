//! What a store's error means for whoever has to put it right.

use object_store::Error;

use crate::error::one_line;

/// One line: what to do, if the store gave a code that says it, and otherwise the store's own words.
pub(crate) fn diagnosis(error: &Error) -> String {
    let words = one_line(error);
    let code = code(&words);
    if let Some((code, advice)) = code.and_then(|code| Some((code, advice(code)?))) {
        return format!("{advice} (the store says {code})");
    }
    match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => format!(
            "the store denies access; the credentials may have expired or lack a right: {words}"
        ),
        _ => words,
    }
}

/// The code of an answer in S3's form.
fn code(words: &str) -> Option<&str> {
    let (_, rest) = words.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    Some(code.trim())
}

/// For the codes that are somebody's mistake: <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>.
fn advice(code: &str) -> Option<&'static str> {
    Some(match code {
        "NoSuchBucket" => "the bucket does not exist; create it, or correct the name in the URL",
        "AccessDenied" | "AllAccessDisabled" | "AccountProblem" => {
            "these credentials may not do that; allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucket"
        }
        "InvalidAccessKeyId" => "the store does not know this AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch" => "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
        "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
            "AWS_SESSION_TOKEN has expired or is wrong; get a new one"
        }
        "RequestTimeTooSkewed" => "the clock of this machine is wrong",
        // Azure's: <https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes>.
        "ContainerNotFound" => {
            "the container does not exist; create it, or correct the name in the URL"
        }
        "AuthenticationFailed" => {
            "AZURE_STORAGE_ACCOUNT_KEY does not belong to AZURE_STORAGE_ACCOUNT_NAME, or the credentials have expired"
        }
        "AuthorizationFailure" | "AuthorizationPermissionMismatch" => {
            "these credentials may not do that; give them the role Storage Blob Data Contributor, or correct AZURE_STORAGE_ACCOUNT_KEY"
        }
        "PermanentRedirect"
        | "AuthorizationHeaderMalformed"
        | "IllegalLocationConstraintException"
        | "IncorrectEndpoint" => "the bucket lies in another region; set AWS_REGION to it",
        "NotImplemented" => {
            "the store lacks something that S3 has; an S3 server with conditional writes is needed"
        }
        "QuotaExceeded" | "InsufficientStorage" | "XMinioStorageFull" => {
            "the store is full; `everstep checkpoint prune` makes room"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(words: &str) -> Error {
        Error::Generic {
            store: "S3",
            source: words.into(),
        }
    }

    #[test]
    fn a_known_code_becomes_advice_and_others_stay() {
        let known = error(
            "Server returned error response: <?xml version='1.0'?>\n<Error><Code>SignatureDoesNotMatch</Code><Message>long</Message></Error>",
        );
        assert_eq!(
            diagnosis(&known),
            "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID (the store says SignatureDoesNotMatch)"
        );
        let unknown = diagnosis(&error("<Error><Code>Teapot</Code></Error>"));
        assert!(unknown.contains("<Code>Teapot</Code>"), "{unknown}");
        let broken = diagnosis(&error("connection closed, <Code>Acc"));
        assert!(broken.contains("connection closed"), "{broken}");
    }
}
