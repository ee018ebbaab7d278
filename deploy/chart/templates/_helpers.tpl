{{/* Labels that never change: the DaemonSet selects its pods by them. */}}
{{- define "lb.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lb.labels" -}}
{{ include "lb.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{/* The port of an address like 0.0.0.0:10256 or [::]:10256. */}}
{{- define "lb.port" -}}
{{- regexFind "[0-9]+$" . | required (printf "no port in %q" .) -}}
{{- end }}
